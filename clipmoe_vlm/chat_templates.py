"""The chat templates of LLaVA's formats: in training, and with every processor that is saved."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from .runs import UserError

IMAGE_TOKEN = "<image>"

# Messages whose content is a list (`{"type": "image"}`, `{"type": "text", "text": ...}`) become plain text, each
# picture as LLaVA writes it: the mark on a line of its own.
_FLATTEN = """\
{%- set flat = namespace(messages=[], text='', pictures=0) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set flat.text = message['content'] -%}
{%- else -%}
{%- set flat.text = '' -%}{%- set flat.pictures = 0 -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set flat.text = flat.text + '<image>\\n' -%}{%- set flat.pictures = flat.pictures + 1 -%}
{%- else -%}
{%- set flat.text = flat.text + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- if flat.pictures -%}{%- set flat.text = flat.text | trim -%}{%- endif -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': flat.text}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""

# LLaVA's stage 1: the picture, then the caption on one line; the question is dropped.
_PLAIN = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<image>' * (message['content'].split('<image>') | length - 1) -}}
{%- elif message['role'] == 'assistant' -%}
{{- message['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
"""

# Vicuna v1.1, LLaVA-1.5's stage 2.
_V1 = """\
{%- if messages and messages[0]['role'] == 'system' -%}
{{- messages[0]['content'] + ' ' -}}
{%- else -%}
{{- "A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- 'USER: ' + message['content'] + ' ' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'ASSISTANT: ' + message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The jinja template of a format: `plain`, `v1`, or `chat` (the tokenizer's own).

    Raises:
        UserError: `chat`, and the tokenizer has no template.
    """
    if name == "plain":
        return _FLATTEN + _PLAIN
    if name == "v1":
        return _FLATTEN + _V1
    if not tokenizer.chat_template:
        raise UserError(f"template: chat, but the tokenizer in {tokenizer.name_or_path} has no chat template; give it "
                        "one, or use template: v1 (Vicuna's, for instructions) or plain (for captions)")
    # A tokenizer that writes its own <s> would meet a second one from a template that writes it too.
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return _FLATTEN + ("{%- set bos_token = '' -%}\n" if adds_bos else "") + tokenizer.chat_template
