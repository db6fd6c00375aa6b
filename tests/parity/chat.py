"""Renders chat templates with transformers, for worker/data/tests/chat.rs. See README.md.

    python chat.py           writes golden/chat/expected of worker/data anew
    python chat.py check     renders again and compares, in whatever version of transformers this is

Needs transformers (5.24) and jinja2, no torch. Templates are the files of golden/chat/templates and fleet's own.
"""

import datetime
import json
import pathlib
import sys

import transformers
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent
DATA = HERE.parent.parent / "worker" / "data"
CHAT = DATA / "tests" / "golden" / "chat"
TOKENIZER = HERE / "golden" / "foreign" / "byte_level"
NOW = datetime.datetime(2026, 3, 7, 14, 5, 9)

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How the weather is <now> & \"soon\"",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Stadt, caf\u00e9"},
                "days": {"type": "integer", "enum": [1, 2], "default": 1},
                "scale": {"type": "array", "items": {"type": "number"}},
            },
            "required": ["place"],
        },
    },
}
CALL = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"place": "Bern \u2744", "days": 2, "exact": True, "scale": [0.5, 1e-7]}}}
CONVERSATIONS = {
    "question": {"messages": [{"role": "user", "content": "What is 2 + 2?"}]},
    "turns": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "Nothing."},
        ]
    },
    "unicode": {
        "messages": [
            {"role": "user", "content": "  caf\u00e9 \U0001f600\n\n<b>\"quoted\"</b> {{ x }} \u65e5\u672c\r\n "},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nJa, s\u00fc\u00df \u20ac "},
            {"role": "user", "content": ""},
            {"role": "assistant", "content": "\U0001f468\u200d\U0001f469\u200d\U0001f467 line\nline\n"},
        ]
    },
    "thoughts": {
        "messages": [
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Because.", "reasoning_content": "Let me see.\nYes."},
            {"role": "user", "content": "Really?"},
            {"role": "assistant", "content": "Yes.", "thinking": "Sure"},
        ],
        "variables": {"enable_thinking": False},
    },
    "tools": {
        "messages": [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "Weather in Bern?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "{\"snow\": true}"},
            {"role": "assistant", "content": "It snows."},
        ],
        "tools": [WEATHER],
    },
    "blocks": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "three"}]},
        ]
    },
    "documents": {
        "messages": [{"role": "user", "content": "What is said?"}],
        "documents": [{"title": "First", "text": "A harbour."}, {"title": "Zweites", "text": "\u00dcber den Flu\u00df"}],
    },
    "disorder": {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
}
ENDINGS = {"complete": {}, "prompt": {"add_generation_prompt": True}, "open": {"continue_final_message": True}}


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


def spans(template, conversation, tokenizer):
    """Of generation blocks, as bytes of the text."""
    given = {name: conversation.get(name) for name in ("tools", "documents")}
    messages = chat_template_utils._normalize_chat_messages(conversation["messages"])
    texts, indices = chat_template_utils.render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **given,
        **tokenizer.special_tokens_map, **conversation.get("variables", {}),
    )
    size = lambda end: len(texts[0][:end].encode())
    return [[size(start), size(end)] for start, end in indices[0]]


def render(template, conversation, ending, tokenizer):
    given = {name: conversation.get(name) for name in ("messages", "tools", "documents")}
    options = {"conversation": given.pop("messages"), "chat_template": template, **given, **conversation.get("variables", {})}
    try:
        found = {"text": tokenizer.apply_chat_template(**options, **ENDINGS[ending], tokenize=False)}
    except Exception as error:  # whatever a template runs into
        return {"error": str(error).split("\n")[0][:200] or type(error).__name__}
    if "{% generation" in template.replace("{%-", "{%") and ending == "complete":
        found["spans"] = spans(template, conversation, tokenizer)
        encoded = tokenizer.apply_chat_template(**options, return_assistant_tokens_mask=True, return_dict=True)
        found["ids"] = " ".join(map(str, encoded["input_ids"]))
        found["mask"] = "".join(map(str, encoded["assistant_masks"]))
    return found


def main():
    chat_template_utils.datetime = Clock
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    own = sorted((DATA / "src" / "chat" / "templates").glob("*.jinja"))
    files = [(path.stem, path) for path in sorted((CHAT / "templates").glob("*.jinja"))]
    files += [("fleet_" + path.stem, path) for path in own]
    made = {"conversations.json": CONVERSATIONS}
    for name, path in files:
        template = path.read_text()
        cases = ((case, ending) for case in CONVERSATIONS for ending in ENDINGS)
        made[f"expected/{name}.json"] = {
            f"{case} {ending}": render(template, CONVERSATIONS[case], ending, tokenizer)
            for case, ending in cases
            if ending != "open" or CONVERSATIONS[case]["messages"][-1]["role"] == "assistant"
        }
    differ = 0
    for name, value in made.items():
        text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
        if sys.argv[1:] == ["check"]:
            differ += (CHAT / name).read_text() != text
        else:
            (CHAT / name).write_text(text)
    print(f"transformers {transformers.__version__}: {len(files)} templates, {differ} files differ")
    return differ > 0


if __name__ == "__main__":
    sys.exit(main())
