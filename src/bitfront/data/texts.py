"""Texts as ids of tokens: by the tokenizer that the model or the settings name, all of one length."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from bitfront import libraries
from bitfront.config import Table
from bitfront.data.base import GIB, DataRequest, Split
from bitfront.data.raw import Array
from bitfront.errors import ConfigError, DataError, MissingExtraError, cause, require

SETTINGS = ("dataset_settings",)


class TextSettings(Table):
    """Settings of data that are texts."""

    text_columns: list[str] = Field(
        [], description="one column of texts, or two for pairs; default: all columns of texts"
    )
    tokenizer: str | None = Field(
        None, description="name or folder of a tokenizer of transformers; default: the model's"
    )
    max_length: int | None = Field(
        None, ge=2, description="tokens of a text, longer ones are cut; default: the longest, as far as the model goes"
    )


def tokenizer_of(settings: TextSettings, request: DataRequest) -> str:
    """Name of the tokenizer; empty if neither the settings nor the model name one."""
    return settings.tokenizer or (request.needs.tokenizer if request.needs else "")


def tokenised(
    texts: Mapping[Split | None, Sequence[Array]],
    columns: Sequence[str],
    settings: TextSettings,
    request: DataRequest,
    source: str,
) -> tuple[dict[Split | None, dict[str, Array]], str]:
    """(inputs of the model by split and name, int64, shape (samples, tokens); a note).

    Args:
        texts: by split, the columns of texts: one, or two for pairs.
        columns: their names, for messages.
        settings: tokenizer and length.
        request: what the model needs, and the limit of memory.
        source: what messages call the data.

    Raises:
        ConfigError: there are no texts, or more than two columns.
        DataError: the tokenizer cannot be read, or the ids take too much memory.
        MissingExtraError: transformers is not installed.
    """
    if len(columns) not in (1, 2) or not texts:
        raise ConfigError(
            f"{source} has {len(columns)} columns of texts ({', '.join(columns) or 'none'}), and the model takes one "
            "text or a pair; name them with text_columns, or leave others out with drop_columns",
            key=(*SETTINGS, "text_columns"),
        )
    name = tokenizer_of(settings, request)
    tokenizer = _tokenizer(name)
    if tokenizer.pad_token is None:
        raise DataError(f"the tokenizer {name} has no token to fill up short texts with (pad_token); name another one")
    limit = settings.max_length or int(min(tokenizer.model_max_length, 2**20))
    encoded = {
        split: tokenizer(*[column.tolist() for column in of], truncation=True, max_length=limit)
        for split, of in texts.items()
    }
    length = max(len(ids) for of in encoded.values() for ids in of["input_ids"])
    names = [key for key in tokenizer.model_input_names if key in next(iter(encoded.values()))]
    size = sum(len(of["input_ids"]) for of in encoded.values()) * length * len(names) * 8
    if size > request.limit_bytes:
        raise DataError(
            f"{source}: texts of {length} tokens take {size / GIB:.3g} GiB in memory, and limit_bytes is "
            f"{request.limit_bytes / GIB:.3g} GiB; set a smaller max_length, or samples, in [dataset_settings]"
        )
    inputs: dict[Split | None, dict[str, Array]] = {}
    for split, of in encoded.items():
        padded = tokenizer.pad(dict(of), padding="max_length", max_length=length, return_tensors="np")
        inputs[split] = {key: np.asarray(padded[key], dtype=np.int64) for key in names}
    full = sum(len(ids) == limit for of in encoded.values() for ids in of["input_ids"])
    cut = f"; {full:,} of them have {limit} or more, and are cut" if full else ""
    return inputs, f"texts ({', '.join(columns)}): ids of {length} tokens by the tokenizer {name}{cut}"


def _tokenizer(name: str) -> Any:
    """The tokenizer, from the cache or a folder if it is there, else downloaded. No code of it is run."""
    purpose = f"the tokenizer {name}"
    with contextlib.suppress(MissingExtraError):
        libraries.torchvision(purpose)  # transformers imports it where it is installed
    auto = require("transformers", "hf", purpose).AutoTokenizer
    place = str(Path(name).expanduser().absolute()) if name.startswith((".", "/", "~")) else name
    try:
        with libraries.without_output():
            try:
                return auto.from_pretrained(place, local_files_only=True, trust_remote_code=False)
            except OSError:
                return auto.from_pretrained(place, trust_remote_code=False)
    except Exception as error:
        raise DataError(
            f"the tokenizer {name} cannot be read ({cause(error)}). Without a network, put its files into the cache "
            f"of the hub (`hf download {name}` on a machine with one; HF_HOME names the folder), or into a folder, and "
            "set tokenizer = './FOLDER' in [dataset_settings]"
        ) from error
