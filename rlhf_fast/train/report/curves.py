"""Which curves a stage's log gives, and one sentence on how to read each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_fast.train.report.plot import Point, Reference, Series, line_chart, number
from rlhf_fast.train.report.read import Run, Stage, finite

STEP_NAMES = {"sft": "optimiser step", "reward": "optimiser step", "ppo": "policy update", "dpo": "optimiser step"}


@dataclass(frozen=True)
class Line:
    """A logged metric and how it is drawn: see plot.Series."""

    metric: str
    label: str
    kind: str = "noisy"


@dataclass(frozen=True)
class Curve:
    """One chart of a stage. `detail`: of interest when something looks wrong, so kept behind the main ones."""

    title: str
    unit: str
    explanation: str
    lines: tuple[Line, ...]
    percent: bool = False
    include: tuple[float, ...] = ()
    references: tuple[Reference, ...] = ()
    target: str = ""  # key of the stage's config whose value is drawn as a reference line
    detail: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawn curve. `summary` gives each line's count, first, last, lowest and highest value for report.json."""

    id: str
    title: str
    explanation: str
    svg: str
    series: tuple[Series, ...]
    detail: bool = False

    @property
    def summary(self) -> dict:
        return {"id": self.id, "title": self.title, "series": [_summary(line) for line in self.series]}


LEARNING_RATE = "The schedule as it was applied: a short rise (warm-up), then the fall that was asked for."
GRADIENT_NORM = (
    "The length of the gradient before clipping. Single spikes are harmless because they are clipped; "
    "steady growth announces divergence."
)

# Of every stage that takes its steps on a file.
OF_STEPS = (
    Curve("Gradient norm", "L2 norm", GRADIENT_NORM, (Line("grad_norm", "each step"),), include=(0,), detail=True),
    Curve(
        "Learning rate",
        "per step",
        LEARNING_RATE,
        (Line("learning_rate", "each step", "line"),),
        include=(0,),
        detail=True,
    ),
)
SPEED = Curve(
    "Speed",
    "tokens per second",
    "Training tokens per second of wall time; dips are other work on the machine.",
    (Line("tokens_per_second", "each step"),),
    include=(0,),
    detail=True,
)

CURVES: dict[str, tuple[Curve, ...]] = {
    "sft": (
        Curve(
            "Loss",
            "nats per reply token",
            "How surprised the model is by the demonstrations. It should fall and level off; held-out loss that rises "
            "while training loss still falls means that the model learns the rows by heart.",
            (Line("loss", "training"), Line("eval_loss", "held-out", "marks")),
        ),
        Curve(
            "Entropy",
            "nats per token",
            "How undecided the model is about the next token. It falls as the model learns; close to 0 it would say "
            "the same words every time.",
            (Line("entropy", "training"),),
            include=(0,),
        ),
        *OF_STEPS,
        SPEED,
    ),
    "reward": (
        Curve(
            "Loss",
            "nats per pair",
            "−log of the probability that the model gives to the human choice. Guessing scores ln 2 = 0.693, so it "
            "should fall below that; held-out loss that turns up again means overfitting.",
            (Line("loss", "training"), Line("eval_loss", "held-out", "marks")),
            references=(Reference(math.log(2), "guessing"),),
            include=(math.log(2),),
        ),
        Curve(
            "Accuracy",
            "share of pairs",
            "How often the chosen reply gets the higher score. 50% is guessing; people agree with one another on about "
            "three pairs of four (73–77% in InstructGPT), so such values are close to the ceiling on human labels.",
            (Line("accuracy", "training"), Line("eval_accuracy", "held-out", "marks")),
            percent=True,
            references=(Reference(0.5, "guessing"),),
            include=(0.5, 1.0),
        ),
        Curve(
            "Margin",
            "score, chosen − rejected",
            "How far the chosen reply is ahead of the rejected one on average. It should rise above 0; its size has no "
            "meaning of its own.",
            (Line("margin", "training"),),
            references=(Reference(0, ""),),
            include=(0,),
        ),
        Curve(
            "Scores",
            "score",
            "Highest, mean and lowest score in the batch. Only differences are trained, so the whole band may drift; "
            "it is brought to mean 0 and standard deviation 1 on the SFT model's replies afterwards.",
            (Line("max_reward", "highest"), Line("mean_reward", "mean"), Line("min_reward", "lowest")),
        ),
        *OF_STEPS,
    ),
    "dpo": (
        Curve(
            "Loss",
            "per pair",
            "How far the policy is from preferring the chosen replies, by the chosen kind of loss. DPO's own starts at "
            "ln 2 = 0.693, where the policy still is the SFT model; held-out loss that turns up again means overfitting.",
            (Line("loss", "training"), Line("eval_loss", "held-out", "marks")),
        ),
        Curve(
            "Accuracy",
            "share of pairs",
            "How often the chosen reply has gained more probability than the rejected one. 50% is guessing; people agree "
            "with one another on about three pairs of four, so much more on human labels would be learning by heart.",
            (Line("rewards/accuracies", "training"), Line("eval_rewards/accuracies", "held-out", "marks")),
            percent=True,
            references=(Reference(0.5, "guessing"),),
            include=(0.5, 1.0),
        ),
        Curve(
            "Implicit rewards",
            "beta x log-ratio",
            "How much more probable than for the SFT model the replies have become, times beta. The chosen ones should end "
            "above the rejected ones; where both fall far below 0, probability goes to replies that nobody compared.",
            (Line("rewards/chosen", "chosen"), Line("rewards/rejected", "rejected")),
            references=(Reference(0, ""),),
            include=(0,),
        ),
        Curve(
            "Margin",
            "chosen − rejected",
            "How far the implicit reward of the chosen reply is ahead. It should rise above 0 and level off.",
            (Line("rewards/margins", "training"), Line("eval_rewards/margins", "held-out", "marks")),
            references=(Reference(0, ""),),
            include=(0,),
        ),
        Curve(
            "Log-probability of a reply",
            "nats",
            "What the policy makes of whole replies. A slow fall of both is usual; a steep one of the chosen replies means "
            "that the policy forgets how to write them: raise beta, or lower the learning rate.",
            (Line("logps/chosen", "chosen"), Line("logps/rejected", "rejected")),
        ),
        Curve(
            "Entropy",
            "nats per token",
            "How undecided the policy is about the next token of these replies.",
            (Line("entropy", "policy"),),
            include=(0,),
            detail=True,
        ),
        *OF_STEPS,
        SPEED,
    ),
    "ppo": (
        Curve(
            "Reward-model score",
            "score per reply",
            "What the policy is after: the reward model's mean score of sampled replies. It should rise. That alone does not "
            "show better replies, only replies that the reward model likes better.",
            (Line("objective/scores", "score"), Line("objective/rlhf_reward", "score minus KL penalty")),
        ),
        Curve(
            "Distance from the SFT model (KL)",
            "nats per reply",
            "How far the policy has moved, summed over a reply. It starts near 0, grows and should slow down; growth "
            "without end is how a policy leaves the region in which the reward model can be trusted.",
            (Line("objective/kl", "KL"),),
            include=(0,),
        ),
        Curve(
            "Win rate during training",
            "share of held-out prompts",
            "How often the judge prefers the policy of that moment to the one PPO started from, a tie counting half, with its "
            "95% interval. It should rise and stay; where it turns back while the score still rises, PPO has begun to "
            "exploit the reward.",
            (
                Line("eval/win_rate", "win rate", "marks"),
                Line("eval/win_rate_lo", "95% interval, from", "line"),
                Line("eval/win_rate_hi", "to", "line"),
            ),
            percent=True,
            references=(Reference(0.5, "no difference"),),
            include=(0.5,),
        ),
        Curve(
            "Judge and reward on held-out prompts",
            "score per reply",
            "What PPO is paid for and what the judge thinks of the same replies. The two have scales of their own; what "
            "counts is whether they rise together.",
            (Line("eval/judge", "judge", "marks"), Line("eval/reward", "reward", "marks")),
        ),
        Curve(
            "Entropy",
            "nats per token",
            "How undecided the policy is about the next token. A slow fall is normal; a collapse to about 0 means that "
            "it gives the same answer to everything.",
            (Line("policy/entropy_avg", "policy"),),
            include=(0,),
        ),
        Curve(
            "Clip fraction",
            "share of tokens, with RLOO of replies",
            "Tokens on which PPO's clipping held the update back. Some is normal; none at all means very careful "
            "steps, and a share that keeps growing means that the steps are too large.",
            (Line("policy/clipfrac_avg", "policy"),),
            percent=True,
            include=(0,),
        ),
        Curve(
            "Policy loss",
            "clipped surrogate",
            "Watch that it stays calm, not that it falls: the advantages are usually centred anew in each batch, so "
            "its level says nothing about how good the policy is.",
            (Line("loss/policy_avg", "policy"),),
            references=(Reference(0, ""),),
            include=(0,),
        ),
        Curve(
            "Value loss",
            "squared error",
            "How wrong the value model is about the reward to come. It may rise while the policy changes fast, and "
            "should come down or settle afterwards.",
            (Line("loss/value_avg", "value model"),),
            include=(0,),
        ),
        Curve(
            "Reply length",
            "tokens",
            "Mean length of sampled replies. A steady drift, up or down, often means that the reward model pays for "
            "length rather than for content: read the samples.",
            (Line("response/length", "reply"),),
            include=(0,),
        ),
        Curve(
            "Replies that end by themselves",
            "share of replies",
            "Replies that stop with the end token before the length limit. Usually it should be close to 100%; a fall "
            "means that the policy rambles on.",
            (Line("response/eos_rate", "replies"),),
            percent=True,
            include=(0, 1),
        ),
        Curve(
            "Size of each update (approximate KL)",
            "nats per token, with RLOO per reply",
            "How far one round of updates moves the policy away from the one that wrote the replies. Small and even is "
            "healthy; spikes mean a learning rate or a number of epochs that is too high.",
            (Line("policy/approxkl_avg", "new vs. old policy"),),
            include=(0,),
            target="target_kl",
        ),
        Curve(
            "Value model: explained variance",
            "share",
            "How much of the differences in return the value model foresees: 1 is all, 0 is no better than always "
            "guessing the mean, below 0 is worse than that. It should rise.",
            (Line("val/explained_var", "value model"),),
            references=(Reference(0, "the mean"),),
            include=(0, 1),
            detail=True,
        ),
        Curve(
            "Probability ratio",
            "new / old",
            "Mean ratio of new to old probability of the sampled tokens. It stays very close to 1; a lasting departure "
            "means that old and new log-probabilities do not match.",
            (Line("val/ratio", "mean"),),
            references=(Reference(1, ""),),
            include=(1,),
            detail=True,
        ),
        Curve(
            "KL coefficient",
            "reward per nat",
            "The price of moving away from the SFT model. It is constant unless an adaptive target is set.",
            (Line("objective/kl_coef", "coefficient", "line"),),
            include=(0,),
            detail=True,
        ),
        Curve(
            "Gradient norm",
            "L2 norm",
            GRADIENT_NORM,
            (Line("policy/grad_norm", "policy"), Line("value/grad_norm", "value model")),
            include=(0,),
            detail=True,
        ),
        Curve(
            "Learning rate", "per step", LEARNING_RATE, (Line("lr", "each update", "line"),), include=(0,), detail=True
        ),
        Curve(
            "Speed",
            "tokens per second",
            "Sampled tokens per second of wall time; dips are other work on the machine.",
            (Line("tokens_per_second", "each update"),),
            include=(0,),
            detail=True,
        ),
    ),
}


def charts(run: Run, stage: str) -> list[Chart]:
    """The charts that the stage's log has numbers for, in reading order."""
    drawn = [_draw(run.stages[stage], curve) for curve in CURVES[stage]]
    if stage == "ppo":
        drawn[2:2] = [_frontier(run.stages[stage]), _judged_frontier(run.stages[stage])]
    return [chart for chart in drawn if chart is not None]


def _draw(stage: Stage, curve: Curve) -> Chart | None:
    series = []
    for line in curve.lines:
        points = stage.curve(line.metric)
        if points:
            series.append(Series(line.label, points, line.kind, colour=len(series)))
    if not series:
        return None
    references = list(curve.references)
    target = finite(stage.summary, "config", curve.target) if curve.target else None
    if target is not None:
        references.append(Reference(target, f"{curve.target} {number(target)}"))
    chart_id = f"{stage.name}-{curve.lines[0].metric}".replace("/", "-").replace("_", "-")
    svg = line_chart(
        chart_id,
        f"{stage.name}: {curve.title}, {curve.unit}",
        series,
        x_label=STEP_NAMES[stage.name],
        y_label=curve.unit,
        percent=curve.percent,
        include=curve.include,
        references=references,
    )
    return Chart(chart_id, curve.title, curve.explanation, svg, tuple(series), curve.detail)


def _frontier(stage: Stage) -> Chart | None:
    """Score against KL (Gao et al. 2023): what each step away from the SFT model bought."""
    kl, scores = dict(stage.curve("objective/kl")), dict(stage.curve("objective/scores"))
    points: list[Point] = [
        (kl[step], scores[step])
        for step in sorted(kl.keys() & scores.keys())
        if math.isfinite(kl[step]) and math.isfinite(scores[step])
    ]
    if len(points) < 3:
        return None
    series = Series("one update, darker is later", points, "scatter")
    svg = line_chart(
        "ppo-score-kl",
        "ppo: score against distance from the SFT model",
        [series],
        x_label="KL to the SFT model, nats per reply",
        y_label="score per reply",
        whole_x=False,
    )
    explanation = (
        "What the distance from the SFT model buys. Up is good, right is the price; where the cloud goes right without "
        "going up, the policy pays in KL and gets nothing for it."
    )
    return Chart("ppo-score-kl", "Score for distance", explanation, svg, (series,))


def _judged_frontier(stage: Stage) -> Chart | None:
    """Judge and reward against KL on the same held-out replies: the knee is where the two part."""
    kl = dict(stage.curve("eval/kl"))
    series = []
    for colour, (metric, label) in enumerate((("eval/judge", "judge"), ("eval/reward", "reward"))):
        seen = dict(stage.curve(metric))
        points = [(kl[s], seen[s]) for s in sorted(kl.keys() & seen.keys()) if math.isfinite(kl[s] + seen[s])]
        series.append(Series(label, points, "scatter", colour=colour))
    if min(len(line.points) for line in series) < 3:
        return None
    svg = line_chart(
        "ppo-judge-kl",
        "ppo: judge and reward against distance from the SFT model",
        series,
        x_label="KL to the SFT model, nats per reply",
        y_label="score per reply",
        whole_x=False,
    )
    explanation = (
        "Held-out replies of each look, as the reward and as the judge see them. Where the reward still rises with the "
        "distance and the judge falls, more PPO makes the policy worse (Gao et al. 2023)."
    )
    return Chart("ppo-judge-kl", "What distance buys, by judge and by reward", explanation, svg, tuple(series))


def _summary(line: Series) -> dict:
    values = [y for _, y in line.finite]
    return {
        "label": line.label,
        "points": len(line.points),
        "not_finite": len(line.broken),
        **({"first": values[0], "last": values[-1], "lowest": min(values), "highest": max(values)} if values else {}),
    }
