"""Conversations as a model reads them: through the chat template that belongs to its tokenizer, or one that is given.

A prompt is what the template writes for its messages with the opening of a reply behind them (`add_generation_prompt`); a reply
is what it writes behind that once the reply is there, up to the token that ends a turn. So training, sampling and whoever
serves the model later read the same tokens. Where that token is not the tokenizer's own end token (<|im_end|> in a base model
that ends documents with <|endoftext|>), it becomes the end token: replies are learnt, sampled and cut with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_fast.train.data import Conversation, Message, Rendered, common_length
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.loop import say
from rlhf_fast.train.model import load_tokenizer
from rlhf_fast.train.rows import Flaw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURN, TURN_END = "<|im_start|>", "<|im_end|>"
# ChatML, which a new model gets: the format of most open chat models.
CHATML = (
    f"{{% for message in messages %}}{TURN}{{{{ message.role }}}}\n{{{{ message.content }}}}{TURN_END}\n{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{TURN}assistant\n{{% endif %}}"
)
QUESTION, ANSWER = "What is asked?", "That which is answered."
# Templates of the Llama 3 family write the day of the rendering unless told one; a run resumed tomorrow would read other tokens.
FIXED = {"date_string": "26 Jul 2024"}
SHOWN = 60

Row = TypeVar("Row")


class Chat:
    """Renders the conversations of one data file for one model.

    load: gives the model's tokenizer, and is called at the first conversation; name: what an error calls the model.
    template_file: a Jinja file in place of the tokenizer's own template. system_prompt: stands in front of conversations
    without a message of the system. UserError: no such file, an empty one.
    """

    def __init__(
        self,
        load: Callable[[], PreTrainedTokenizerBase],
        name: str | Path,
        *,
        template_file: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        self._load, self._name = load, name
        self._file, self._system = template_file, system_prompt
        self._template = None if template_file is None else read_template(template_file)
        if system_prompt is not None and not system_prompt.strip():
            raise UserError("'system_prompt' is empty; leave it out, or write what the model is to be told")
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._marks: list[str] = []
        self.end: str | None = None  # the token that ends a turn, where the template writes one

    @classmethod
    def of(cls, config: Any, model: str | Path | None = None, tokenizer: PreTrainedTokenizerBase | None = None) -> Chat:
        """As a config has it; model: in place of its own; tokenizer: of a model that is not on disk yet."""
        model = config.model if model is None else model
        options = {"template_file": config.chat_template, "system_prompt": config.system_prompt}
        return cls(lambda: tokenizer or load_tokenizer(model), model, **options)

    # ------------------------------------------------------------------------------------------------- rendering

    def render(self, row: Row, path: str | Path) -> Row:
        """A row whose prompt is a Conversation -> the same in text. Flaw: the template cannot write it, or not so that it
        could be read back. UserError: the template fits no conversation at all."""
        if self._tokenizer is None:
            self._begin(path)
        conversation, messages = row.prompt, self._with_system(row.prompt)
        for message in messages:
            self._check_marks(message.content, conversation.field)
        prompt = self._write(messages, conversation.field, add_generation_prompt=True)
        keys = {"chosen": "chosen", "rejected": "rejected", "response": conversation.reply_field}
        replies = {
            name: self._reply(messages, prompt, getattr(row, name), key)
            for name, key in keys.items()
            if hasattr(row, name)
        }
        return dataclasses.replace(row, prompt=Rendered(prompt, conversation.messages), **replies)

    def _with_system(self, conversation: Conversation) -> tuple[Message, ...]:
        messages = conversation.messages
        if self._system is None or messages[0].role == "system":
            return messages
        return (Message("system", self._system), *messages)

    def _reply(self, messages: tuple[Message, ...], prompt: str, reply: str, field: str) -> str:
        self._check_marks(reply, field)
        whole = self._write((*messages, Message("assistant", reply)), field, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise Flaw(
                field,
                f"the chat template writes the prompt in another way once a reply follows: {_apart(prompt, whole)}",
            )
        rest = whole[len(prompt) :]
        if self.end is None:
            return rest
        text, mark, _ = rest.partition(self.end)
        if not mark:
            raise Flaw(field, f"the chat template does not end this reply with {self.end}")
        return text + mark

    def _check_marks(self, content: str, field: str) -> None:
        for mark in self._marks:
            if mark in content:
                raise Flaw(field, f"holds {mark!r}, which the model would read as the border of a turn; take it out")

    def _write(self, messages: Sequence[Message], field: str, *, add_generation_prompt: bool) -> str:
        try:
            return self._rendered(messages, add_generation_prompt)
        except Exception as error:  # a template is a program, and may stumble over anything
            raise Flaw(field, f"the chat template refuses the conversation: {error}") from None

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            [message._asdict() for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **FIXED,
        )

    # ------------------------------------------------------------------------------------------------- the template

    def _begin(self, path: str | Path) -> None:
        """Take the tokenizer, and see on one question and answer how its template writes turns."""
        self._tokenizer = tokenizer = self._load()
        if self._template is not None:
            tokenizer.chat_template = self._template
        if not tokenizer.chat_template:
            raise UserError(
                f"the rows of {path} are conversations and the tokenizer of {self._name} has no chat template; give one with "
                "--chat_template FILE, as the chat_template.jinja of a chat model of its family, or write the rows as text"
            )
        prompt, whole = self._probe()
        if not whole.startswith(prompt):
            raise self._unfit(f"writes a prompt in another way once a reply follows: {_apart(prompt, whole)}")
        if ANSWER not in whole[len(prompt) :] or QUESTION not in prompt:
            raise self._unfit("leaves out what was said")
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._marks = [token for token in special if token in whole]
        behind = whole.rpartition(ANSWER)[2]
        places = {behind.find(mark): mark for mark in self._marks if mark in behind}
        self.end = places[min(places)] if places else None
        if self.end is not None and self.end != tokenizer.eos_token:
            say(
                f"replies end with {self.end}, as the chat template of {self._name} has it, not with {tokenizer.eos_token}"
            )
            tokenizer.eos_token = self.end

    def _probe(self) -> tuple[str, str]:
        question = [Message("user", QUESTION)]
        try:
            return self._rendered(question, True), self._rendered([*question, Message("assistant", ANSWER)], False)
        except ImportError as error:
            raise UserError(f"chat templates need jinja2: pip install jinja2 ({error})") from None
        except Exception as error:
            raise self._unfit(f"cannot write a question and its answer: {error}") from None

    def _unfit(self, why: str) -> UserError:
        origin = f"of {self._name}" if self._file is None else f"in {self._file}"
        return UserError(f"the chat template {origin} {why}; correct it, or give another with --chat_template FILE")

    # --------------------------------------------------------------------------------------------- what came of it

    def check_read(self, path: str | Path) -> None:
        """UserError if something was asked for conversations and `path` holds none."""
        given = [name for name, value in (("chat_template", self._file), ("system_prompt", self._system)) if value]
        if given and self._tokenizer is None:
            raise UserError(
                f"'{given[0]}' is for conversations, and the rows of {path} are texts; leave it out, or give messages in place "
                "of texts"
            )

    def adopt(self, tokenizer: PreTrainedTokenizerBase, name: str | Path) -> bool:
        """Give the tokenizer of a model the template and the end token that were read with -> whether the end is a new one.

        UserError if the model has another template of its own: what was rendered would mean something else to it.
        """
        if self._tokenizer is None:
            return False
        if self._template is None and tokenizer.chat_template != self._tokenizer.chat_template:
            raise UserError(
                f"{name} has another chat template than {self._name}, so it would be given prompts in a form that it does not "
                "know; give both the same chat_template.jinja"
            )
        tokenizer.chat_template = self._tokenizer.chat_template
        if tokenizer.eos_token == self._tokenizer.eos_token:
            return False
        tokenizer.eos_token = self._tokenizer.eos_token
        return True


def read_template(path: str | Path) -> str:
    """The text of a chat template. UserError: no such file, not UTF-8, empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"chat template {path} cannot be read: {reason}; give a Jinja file") from None
    if not text.strip():
        raise UserError(f"chat template {path} is empty; give a Jinja file")
    return text


def _apart(prompt: str, whole: str) -> str:
    """Where two renderings part."""
    place = common_length(prompt, whole)
    return f"{prompt[place : place + SHOWN]!r} becomes {whole[place : place + SHOWN]!r}"
