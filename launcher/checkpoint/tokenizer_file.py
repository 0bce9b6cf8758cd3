"""`grokmoe checkpoint convert-tokenizer`: a SentencePiece model as tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from grokmoe.errors import ConfigError
from grokmoe.sentencepiece_model import SentencePieceModel
from grokmoe.tokenizer import SENTENCEPIECE_MODEL, TOKENIZER_JSON

PASS_THROUGH_TEMPLATE = """\
{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"""
"""Contents of the messages, line by line: a base model knows no roles, but gateways ask for a template."""


def convert_tokenizer(model: str, output: str | None) -> int:
    """Writes a SentencePiece model as tokenizer.json, with a tokenizer_config.json beside it if there is none.

    model: the file, or a directory with a tokenizer.model.
    output: None: tokenizer.json beside the model, which must not be there yet.

    Returns the exit code. Raises ConfigError for a model that cannot be converted exactly.
    """
    source = Path(model) / SENTENCEPIECE_MODEL if Path(model).is_dir() else Path(model)
    target = source.with_name(TOKENIZER_JSON) if output is None else Path(output)
    if output is None and target.exists():
        raise ConfigError(f"{target}: is there already; name the file with --output to replace it")
    pieces = SentencePieceModel.from_file(source)
    config = target.with_name("tokenizer_config.json")
    has_config = config.exists()
    try:
        _replace(target, pieces.to_backend().to_str())
        if not has_config:
            _replace(config, json.dumps(_tokenizer_config(pieces), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{target}: {len(pieces.ids):,} pieces of {source}")
    console.print(f"{config}: {'left as it was' if has_config else 'with a chat template that joins the messages'}")
    return 0


def _tokenizer_config(pieces: SentencePieceModel) -> dict[str, object]:
    tokens = {f"{role}_token": piece for role, piece in pieces.roles.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": PASS_THROUGH_TEMPLATE,
    }


def _replace(path: Path, text: str) -> None:
    """Writes beside the file and moves into its place, so that no reader finds half of it."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
