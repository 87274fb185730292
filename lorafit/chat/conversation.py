"""A conversation in the terminal: what was said, which model answers, and the commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lorafit.chat import ChatOptions, Turn, Write, harmless
from lorafit.chat.room import Room
from lorafit.console import Console
from lorafit.errors import (
    LorafitError,
    UsageError,
)
from lorafit.evaluate.assemble import BASE
from lorafit.rows import Message
from lorafit.targets import near

HELP = """\
/adapter NAME    answer with this model from now on, in the same conversation; without a NAME: which there are
/base            answer with the base
/compare TEXT    the answers of all models to TEXT, or to the last prompt; they are not kept
/system TEXT     change the system message, and keep what was said; without a TEXT: none
/reset           forget what was said
/quit            leave, as Ctrl-D does
//…              a prompt that begins with a slash
Ctrl-C stops an answer."""


@dataclass
class Conversation:
    """What was said, who answers, and what the commands do.

    Attributes:
        messages: the prompts and answers that the next answer is given to, without the system message.
        turns: every answer that was given, kept or not.
    """

    room: Room
    options: ChatOptions
    console: Console
    write: Write
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.using = self.room.first
        self.system = ""
        self.set_system((self.options.system or "").strip())

    def say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def run(self, read: Callable[[str], str]) -> None:
        """Read prompts and commands until there is an end to it."""
        self.say(f"{', '.join(self.room.names)}; /help tells what there is to do", "dim")
        interrupted = False
        while True:
            try:
                line = read(f"{self.using}> ")
            except EOFError:
                self.write("\n")
                return
            except KeyboardInterrupt:
                self.write("\n")
                if interrupted:
                    return
                interrupted = True
                self.say("Ctrl-C once more leaves, as /quit and Ctrl-D do", "dim")
                continue
            interrupted = False
            try:
                if self.take(line):
                    return
            except LorafitError as error:
                self.say(str(error), "red")

    def take(self, line: str) -> bool:
        """Answer a line or do what it commands; whether it is the end. Raises LorafitError."""
        if line.startswith("/") and not line.startswith("//"):
            word, _, rest = line.partition(" ")
            return self.command(word.rstrip(), rest.strip())
        if line.strip():
            self.ask(line.removeprefix("/") if line.startswith("//") else line)
        return False

    def command(self, word: str, rest: str) -> bool:
        commands: dict[str, Callable[[str], None]] = {
            "/adapter": self.switch,
            "/base": lambda _: self.switch(BASE),
            "/compare": self.compare,
            "/system": self.set_system,
            "/reset": lambda _: self.messages.clear(),
            "/help": lambda _: self.say(HELP),
        }
        if word == "/quit":
            return True
        if word not in commands:
            raise UsageError(f"{word}: is no command{near(word, [*commands, '/quit'])}")
        commands[word](rest)
        return False

    def switch(self, name: str) -> None:
        """Let another model answer; without a name, say which there are."""
        if name:
            self.using = known(name, self.room.names)
        else:
            self.say("\n".join(f"{'*' if one == self.using else ' '} {one}" for one in self.room.names))

    def set_system(self, text: str) -> None:
        """Have a system message from now on. Raises UsageError, and DataError if the template refuses it."""
        if text and self.room.template is None:
            raise UsageError("there is no chat template, so there is no place for a system message")
        if text and text.split()[0] not in self.room.text([_message("system", text), _message("user", "x")]):
            self.say("the chat template leaves out the system message", "yellow")
        self.system = text

    def ask(self, prompt: str) -> Turn:
        """Have a prompt answered, and keep both. Raises LorafitError, and keeps neither."""
        said: list[Message] = [*self.messages, _message("user", prompt)]
        turn = self._answer(self.using, said)
        self.messages = [*said, _message("assistant", turn.answer.strip())]
        return turn

    def compare(self, prompt: str) -> None:
        """Have a prompt, or the last one, answered by every model, and keep nothing."""
        said: list[Message] = [*self.messages, _message("user", prompt)] if prompt else self.messages[:-1]
        if not said:
            raise UsageError("/compare: there is no prompt yet; give one after it")
        seed = self._seed
        for name in self.room.names:
            self.say(f"{name}:", "bold")
            if self._answer(name, said, seed).ended == "stopped":
                return

    @property
    def _seed(self) -> int:
        return self.options.seed + len(self.turns)

    def _answer(self, name: str, said: list[Message], seed: int | None = None) -> Turn:
        system: list[Message] = [_message("system", self.system)] if self.system else []
        seed = self._seed if seed is None else seed
        turn = self.room.answer(name, [*system, *said], self.options, seed, lambda text: self.write(harmless(text)))
        if not turn.answer.endswith("\n"):
            self.write("\n")
        self.turns.append(turn)
        how = {"end": "", "length": f", cut off at {turn.tokens} tokens", "stopped": ", stopped"}[turn.ended]
        rate = turn.tokens / max(turn.seconds, 1e-9)
        self.say(f"{turn.tokens} tokens, {rate:.1f} tokens/s{how}", "dim")
        return turn


def known(name: str, names: Iterable[str]) -> str:
    """The name, if there is such a model. Raises UsageError."""
    if name not in names:
        raise UsageError(f"there is no model {name!r}{near(name, names)}")
    return name


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
