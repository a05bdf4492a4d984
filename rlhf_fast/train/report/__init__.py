"""The report of a run: `report.html` for people, `report.json` for programs, made from the run's files alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rlhf_fast.train.checkpoint import write_file, write_json
from rlhf_fast.train.report import curves, findings
from rlhf_fast.train.report.page import render
from rlhf_fast.train.report.read import STAGES, Run, finite, read_run

__all__ = ["PAGE", "write_report"]

PAGE = "report.html"
REPEATED = ("samples", "worst_samples", "scores_before", "scores_after")  # long, and already in evaluation.json


def write_report(run_dir: str | Path) -> Path:
    """Make `report.json` and `report.html` in a run's directory and return the path of the page.

    Reads config.yaml, evaluation.json and each stage's stage.json and log.jsonl; a report that is there is replaced.
    The page is one file without scripts that loads nothing from anywhere. A stage that is missing or unfinished and
    a file that is damaged are named in both outputs. UserError when `run_dir` is no run at all.
    """
    run = read_run(run_dir)
    write_json(run.directory / "report.json", summarise(run))
    path = run.directory / PAGE
    with write_file(path) as partial:
        partial.write_text(render(run), encoding="utf-8")
    return path


def summarise(run: Run) -> dict:
    """Everything that the page states, as data: the content of report.json."""
    return {
        "verdict": asdict(findings.verdict(run)),
        "headline": {
            **{
                share.key: {"value": share.value, "low": share.low, "high": share.high}
                for share in findings.shares(run)
            },
            "kl": findings.sequence_kl(run),
            "seconds": findings.total(run, "seconds"),
            "cpu_seconds": findings.total(run, "cpu_seconds"),
        },
        "checks": [asdict(check) for check in findings.checks(run)],
        "problems": list(run.problems),
        "stages": {
            name: {
                "status": stage.status,
                "last_step": finite(stage.log[-1], "step") if stage.log else None,
                **{
                    key: stage.summary.get(key)
                    for key in ("started", "seconds", "cpu_seconds", "parameters", "results")
                },
                "charts": [chart.summary for chart in curves.charts(run, name)],
            }
            for name, stage in run.stages.items()
            if stage.status != "absent"
        },
        "data": findings.data(run).as_dict(),
        "evaluation": {key: value for key, value in run.evaluation.items() if key not in REPEATED},
        "versions": next(
            (versions for name in reversed(STAGES) if (versions := run.stages[name].summary.get("versions"))), None
        ),
    }
