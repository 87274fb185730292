"""axolotl's prompts as templates: that of the type alpaca, and those of a recipe's own."""

from __future__ import annotations

import json
import re
import string
from typing import Any

from lorafit.init.peers.convert import Conversion

_ASKS = "Write a response that appropriately completes the request.\n\n"
_TASK = "Below is an instruction that describes a task"
ALPACA = (
    "{% if input | default('') %}"
    f"{_TASK}, paired with an input that provides further context. {_ASKS}"
    "### Instruction:\n{{ instruction }}\n\n### Input:\n{{ input }}\n\n### Response:\n"
    "{% else %}"
    f"{_TASK}. {_ASKS}### Instruction:\n{{{{ instruction }}}}\n\n### Response:\n"
    "{% endif %}"
)
"""The prompt of the type alpaca, as the Stanford Alpaca data set was trained with."""
_CELLS = ("system", "instruction", "input", "output")
_OWN_PROMPT = {
    "system_prompt": "",
    "field_system": "system",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "format": "{instruction} {input} ",
    "no_input_format": "{instruction} ",
    "system_format": "{system}",
}
"""The keys of a prompt of the user's own, with axolotl's defaults."""
_JINJA = re.compile(r"[{}]")


def own_prompt(c: Conversion, key: str, kind: dict[str, Any]) -> dict[str, Any]:
    """A prompt of the user's own, with {instruction} and {input}, after the row's system prompt or that of all."""
    for strange in sorted({*kind} - {*_OWN_PROMPT}):
        c.note(f"{key}.{strange}", "no equivalent")
    said = {name: str(kind.get(name) or usual) for name, usual in _OWN_PROMPT.items()}
    cells = {name: f"row[{json.dumps(said[f'field_{name}'], ensure_ascii=False)}]" for name in _CELLS}

    def jinja(name: str, known: tuple[str, ...]) -> str:
        try:
            parts = [*string.Formatter().parse(said[name])]
        except ValueError as error:
            c.refuse(f"{key}.{name}", f"{error}; in axolotl's prompts, {{instruction}} and its like stand in braces")
        return "".join(_plain(before) + _cell(c, f"{key}.{name}", cells, field, known) for before, field, *_ in parts)

    system = json.dumps(said["system_prompt"], ensure_ascii=False)
    cells["system"] = f"({cells['system']} | default({system}))"
    prompt = (
        f"{{% if {cells['system']} %}}{jinja('system_format', ('system',))}{{% endif %}}"
        f"{{% if {cells['input']} | default('') %}}{jinja('format', ('instruction', 'input'))}"
        f"{{% else %}}{jinja('no_input_format', ('instruction',))}{{% endif %}}"
    )
    completion = f"{{{{ {cells['output']} }}}}"
    return {"format": "prompt_completion", "template": {"prompt": prompt, "completion": completion}}


def _plain(words: str) -> str:
    """Text as Jinja that writes it."""
    return f"{{{{ {json.dumps(words, ensure_ascii=False)} }}}}" if _JINJA.search(words) else words


def _cell(c: Conversion, key: str, cells: dict[str, str], field: str | None, known: tuple[str, ...]) -> str:
    if field is None:
        return ""
    if field not in known:
        c.refuse(key, f"{{{field}}}: axolotl fills in {', '.join(known)} here; write {{{{ and }}}} for braces")
    return f"{{{{ {cells[field]} }}}}"
