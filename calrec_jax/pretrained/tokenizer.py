"""Tokenizers of open models: `tokenizer.json` by the tokenizers library, `tokenizer.model` by SentencePiece.

Notable: the ids are the library's own for the same text. A text cannot smuggle in control tokens: `<eos>` in an item's
title is encoded as the characters that it is. Which ids begin a segment and end an item is asked of the folder, as
families differ: Gemma and Llama 3 have a BOS; Qwen has none, and what separates documents begins one. Imports no
TensorFlow.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calrec_jax import artifacts
from calrec_jax.errors import CalrecError
from calrec_jax.pretrained.families import Described
from calrec_jax.tokenizer import Tokenizer, lone_surrogates

JSON_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
# What transformers reads of a tokenizer; copied as they are, so that an export has them.
FILES = (
    JSON_FILE, SENTENCEPIECE_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
FOLDER = "tokenizer"  # in a checkpoint that was imported, or beside the stages of a run
_MOST_PADDING = 1024  # rows of an embedding beyond the tokenizer's last id: to a round number, no more
_REPLACEMENT = "\ufffd"


class ImportedTokenizer(Tokenizer, abc.ABC):
    """A tokenizer that came with a model; see `Tokenizer` for what its methods promise.

    Args:
      folder: of the file and of what goes with it.
      ids: "start", "eos" and "pad".
      vocab_size: V, rows of the model's embedding: ids that no token has decode to U+FFFD.

    Raises:
      CalrecError: the file is damaged, or has ids that the model has no row for.
    """

    file: str

    def __init__(self, folder: Path, ids: Mapping[str, int], vocab_size: int):
        self.folder, self._ids, self._vocab_size = Path(folder), dict(ids), vocab_size
        try:
            self.model = (self.folder / self.file).read_bytes()
        except OSError as error:
            raise CalrecError(f"{self.folder / self.file} cannot be read ({error.strerror})") from error
        self._open()
        last = self._last_id()
        if last >= vocab_size or vocab_size - last - 1 > _MOST_PADDING:
            raise CalrecError(
                f"{self.folder / self.file}: has {last + 1:,} ids, and config.json's vocab_size is {vocab_size:,}; "
                f"the model's own tokenizer has as many, or up to {_MOST_PADDING:,} fewer where rows are padded"
            )
        for name, value in self._ids.items():
            if not 0 <= value < vocab_size:
                raise CalrecError(
                    f"{self.folder}: the {name} id {value} is not in the model's vocabulary of {vocab_size:,}"
                )

    @property
    def pad_id(self) -> int:
        """Id of padding; where a family has none, that of EOS."""
        return self._ids["pad"]

    @property
    def eos_id(self) -> int:
        """Id that ends an item to predict."""
        return self._ids["eos"]

    @property
    def start_id(self) -> int:
        """Input id at the first position of a segment: BOS, or what separates documents."""
        return self._ids["start"]

    @property
    def vocab_size(self) -> int:
        """V, rows of the model's embedding; at least as many as there are tokens."""
        return self._vocab_size

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the file, the special ids and V."""
        digest = hashlib.sha256(self.model).hexdigest()
        return artifacts.hash_json({"file": digest, "ids": self._ids, "vocab_size": self._vocab_size})

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as the library gives them; no special ids are added."""
        try:
            return self._encode_texts(list(texts))
        except (TypeError, UnicodeEncodeError) as error:
            raise (lone_surrogates(texts) or error) from error

    def _decode_known(self, ids: list[int]) -> str:
        kept = [i for i in ids if i not in (self.pad_id, self.eos_id, self.start_id)]
        runs = ((known, list(run)) for known, run in itertools.groupby(kept, key=self._has))
        return "".join(self._decode_ids(run) if known else _REPLACEMENT * len(run) for known, run in runs)

    def save(self, path: Path) -> None:
        """Writes the tokenizer's file, atomically."""
        with artifacts.atomic_file(path) as temporary:
            Path(temporary).write_bytes(self.model)

    def write(self, out: Path) -> None:
        """Writes a tokenizer folder, with all files that transformers reads."""
        out.mkdir(parents=True, exist_ok=True)
        names = [name for name in FILES if (self.folder / name).is_file()]
        for name in names:
            with artifacts.atomic_file(out / name) as temporary:
                shutil.copyfile(self.folder / name, temporary)
        settings = {"file": self.file, "ids": self._ids, "vocab_size": self._vocab_size}
        artifacts.write_manifest(
            out,
            kind="tokenizer",
            made_from={"tokenizer": self.fingerprint},
            settings=settings,
            fingerprint=self.fingerprint,
            pieces=self._vocab_size,
            files=artifacts.hash_files([out / name for name in names]),
        )

    @abc.abstractmethod
    def _open(self) -> None:
        """Makes the library's object of the file's bytes."""

    @abc.abstractmethod
    def _last_id(self) -> int:
        """The greatest id that a text can be encoded to."""

    @abc.abstractmethod
    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Ids as the library gives them."""

    @abc.abstractmethod
    def _has(self, token_id: int) -> bool:
        """Whether a token has this id."""

    @abc.abstractmethod
    def _decode_ids(self, ids: list[int]) -> str:
        """The library's text of ids that tokens have."""

    @abc.abstractmethod
    def id_of(self, token: str) -> int | None:
        """The id of a token by its name."""


class JsonTokenizer(ImportedTokenizer):
    """A `tokenizer.json`."""

    file = JSON_FILE

    def _open(self) -> None:
        import tokenizers

        try:
            self._library = tokenizers.Tokenizer.from_buffer(self.model)
        except Exception as error:  # the library raises nothing more exact
            raise CalrecError(
                f"{self.folder / self.file}: is no tokenizer of the tokenizers library ({error})"
            ) from error
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True

    def _last_id(self) -> int:
        added = self._library.get_added_tokens_decoder()
        texts = (i for i, token in added.items() if not token.special)
        return max(itertools.chain(self._library.get_vocab(with_added_tokens=False).values(), texts), default=-1)

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def _has(self, token_id: int) -> bool:
        return self._library.id_to_token(token_id) is not None

    def _decode_ids(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name."""
        return self._library.token_to_id(token)


class SentencePieceTokenizer(ImportedTokenizer):
    """A `tokenizer.model`."""

    file = SENTENCEPIECE_FILE

    def _open(self) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(self.model)
        except (RuntimeError, TypeError) as error:
            raise CalrecError(f"{self.folder / self.file}: is no SentencePiece model ({error})") from error

    def _last_id(self) -> int:
        return self._processor.vocab_size() - 1

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts)

    def _has(self, token_id: int) -> bool:
        return token_id < self._processor.vocab_size() and token_id != self._processor.unk_id()

    def _decode_ids(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name."""
        found = self._processor.piece_to_id(token)
        return found if self._processor.id_to_piece(found) == token else None


_CLASSES: dict[str, type[ImportedTokenizer]] = {c.file: c for c in (JsonTokenizer, SentencePieceTokenizer)}


def from_hf(folder: Path, described: Described) -> ImportedTokenizer:
    """The tokenizer of a Hugging Face folder.

    Raises:
      CalrecError: there is none, its size is not the model's, or nothing says which token ends a text.
    """
    kind = next((kind for name, kind in _CLASSES.items() if (folder / name).is_file()), None)
    if kind is None:
        raise CalrecError(
            f"{folder}: has neither {JSON_FILE} nor {SENTENCEPIECE_FILE}; a model is read with its tokenizer"
        )
    tokenizer = kind(folder, {}, described.vocab_size)
    names: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second says more, where both are there
        if (folder / name).is_file():
            names |= artifacts.read_json(folder / name)
    find = functools.partial(_special, tokenizer, names, described.text_config)
    eos = find("eos")
    if eos is None:
        raise CalrecError(
            f"{folder}: neither tokenizer_config.json (eos_token) nor config.json (eos_token_id) says which token ends "
            "a text"
        )
    start, pad = find("bos"), find("pad")
    ids = {"start": eos if start is None else start, "eos": eos, "pad": eos if pad is None else pad}
    return kind(folder, ids, described.vocab_size)


def _special(
    tokenizer: ImportedTokenizer, names: Mapping[str, Any], config: Mapping[str, Any], what: str
) -> int | None:
    """The id of "bos", "eos" or "pad": by its name in the tokenizer's files, else by its number in the model's."""
    token = names.get(f"{what}_token")
    token = token.get("content") if isinstance(token, Mapping) else token
    if token is not None:
        found = tokenizer.id_of(token)
        if found is None:
            raise CalrecError(f"{tokenizer.folder}: {what}_token={token!r} is no token of {tokenizer.file}")
        return found
    number = config.get(f"{what}_token_id")
    number = number[0] if isinstance(number, list) and number else number
    return number if isinstance(number, int) else None


def load(folder: Path, manifest: Mapping[str, Any]) -> ImportedTokenizer:
    """A tokenizer folder that `ImportedTokenizer.write` wrote; `Tokenizer.load` calls this.

    Raises:
      CalrecError: a file was changed.
    """
    artifacts.check_files(folder, manifest)
    settings = manifest["settings"]
    return _CLASSES[settings["file"]](folder, settings["ids"], settings["vocab_size"])


def adopt_tokenizer(out: str | Path, checkpoint: str | Path) -> None:
    """Copies the tokenizer of a checkpoint into a run folder, or sees that it is there already.

    Args:
      out: the run's tokenizer folder.
      checkpoint: a folder that `calrec import_hf` wrote, which has its tokenizer inside, or a stage of a run, which has
        it beside.

    Raises:
      CalrecError: there is no tokenizer, or `out` holds another one.
    """
    out, checkpoint = Path(out), Path(checkpoint)
    candidates = (checkpoint / "tokenizer", checkpoint.parent / FOLDER)
    source = next((folder for folder in candidates if (folder / artifacts.MANIFEST).exists()), None)
    if source is None:
        raise CalrecError(f"run.init_from={checkpoint}: there is no tokenizer in or beside it; import the model again")
    tokenizer = Tokenizer.load(source)
    if (out / artifacts.MANIFEST).exists():
        there = Tokenizer.load(out)
        if there.fingerprint != tokenizer.fingerprint:
            raise CalrecError(
                f"{out}: holds another tokenizer ({there.fingerprint[:8]}) than run.init_from={checkpoint} "
                f"({tokenizer.fingerprint[:8]}); choose another --run_dir, or delete it and what was made with it"
            )
        return
    with artifacts.atomic_folder(out) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
