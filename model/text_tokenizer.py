"""CLIP's tokenizer: lower-cased byte-level byte-pair encoding whose words end in `</w>`.

Prompts are data: a literal `<|endoftext|>` inside one is read as plain characters.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from model.checkpoint import read_json, read_lines, write_json, write_whole
from model.errors import ModelError

BOS_TOKEN = "<|startoftext|>"
EOS_TOKEN = "<|endoftext|>"
WORD_END = "</w>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_MERGES_HEADER = "#version: 0.2"

Merges = list[tuple[str, str]]


def _byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes, in the published vocabulary's order."""
    return sorted(
        pre_tokenizers.ByteLevel.alphabet(),
        key=lambda character: (ord(character) >= 256, character),
    )


def _engine(vocab: dict[str, int], merges: Merges) -> Tokenizer:
    if lost := [t for pair in merges for t in (*pair, "".join(pair)) if t not in vocab]:
        raise ModelError(
            f"the tokenizer merges into or from {lost[0]!r}, which its vocabulary lacks"
        )
    model = BPE(
        vocab=vocab, merges=merges, end_of_word_suffix=WORD_END, continuing_subword_prefix=""
    )
    engine = Tokenizer(model)
    engine.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return engine


class CLIPTokenizer:
    """Prompts to rows of token ids: begin, words, end, padding."""

    def __init__(self, vocab: dict[str, int], merges: Merges, pad_token: str = EOS_TOKEN) -> None:
        absent = [token for token in (BOS_TOKEN, EOS_TOKEN, pad_token) if token not in vocab]
        if absent:
            raise ModelError(
                f"the tokenizer's vocabulary lacks {absent}: expected a CLIP vocabulary"
            )
        self.vocab = dict(vocab)
        self.merges = list(merges)
        self.pad_token = pad_token
        self._engine = _engine(self.vocab, self.merges)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows a text encoder needs."""
        return max(self.vocab.values()) + 1

    @property
    def bos_token_id(self) -> int:
        """The id that begins every row."""
        return self.vocab[BOS_TOKEN]

    @property
    def eos_token_id(self) -> int:
        """The id that ends every prompt."""
        return self.vocab[EOS_TOKEN]

    @property
    def pad_token_id(self) -> int:
        """The id that fills a row after its end."""
        return self.vocab[self.pad_token]

    def encode(self, text: str) -> list[int]:
        """Ids of the words alone, without begin and end, of any length."""
        clean = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be encoded
        return list(self._engine.encode(clean, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The words of `ids` joined by single spaces; begin, end and padding are left out."""
        special = {self.bos_token_id, self.eos_token_id, self.pad_token_id}
        names = {index: token for token, index in self.vocab.items()}
        joined = "".join(names[int(i)] for i in ids if int(i) not in special)
        table = {character: byte for byte, character in _bytes_by_character()}
        words = joined.split(WORD_END)
        return " ".join(
            bytes(table[c] for c in word).decode("utf-8", "replace") for word in words
        ).strip()

    def __call__(self, prompts: Sequence[str], length: int) -> Tensor:
        """input_ids_BT (int64), T = `length`: longer prompts are cut so that the end token stays.

        Raises ModelError for a `length` below 2 and for anything but a list of strings.
        """
        if length < 2:
            raise ModelError(
                f"a row of {length} tokens has no place for begin and end: expected at least 2"
            )
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ModelError("prompts must be a list of strings")
        rows = torch.full((len(prompts), length), self.pad_token_id, dtype=torch.long)
        for row, prompt in zip(rows, prompts, strict=True):
            ids = [self.bos_token_id, *self.encode(prompt)[: length - 2], self.eos_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int, min_frequency: int = 2
    ) -> "CLIPTokenizer":
        """Learn merges from `captions`; ids are laid out as published (bytes, word-ending bytes,
        merges, begin, end). The vocabulary is smaller than `vocab_size` when the captions hold no
        more pairs that occur `min_frequency` times. The same captions give the same vocabulary.
        """
        alphabet = _byte_alphabet()
        base = [*alphabet, *(character + WORD_END for character in alphabet)]
        num_merges = vocab_size - len(base) - 2
        if num_merges < 0:
            raise ModelError(
                f"vocab_size is {vocab_size}: expected at least {len(base) + 2} (all bytes, "
                f"begin, end)"
            )
        engine = _engine({}, [])
        trainer = BpeTrainer(
            vocab_size=len(base) + num_merges,
            min_frequency=min_frequency,
            initial_alphabet=alphabet,
            # Naming the word-ending bytes first fixes their ids, and with them the order of ties.
            special_tokens=base[len(alphabet) :],
            end_of_word_suffix=WORD_END,
            show_progress=False,
        )
        engine.train_from_iterator(captions, trainer)
        learned = _as_pairs(json.loads(engine.to_str())["model"]["merges"])[:num_merges]
        tokens = list(
            dict.fromkeys([*base, *(left + right for left, right in learned), BOS_TOKEN, EOS_TOKEN])
        )
        return cls({token: index for index, token in enumerate(tokens)}, learned)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "CLIPTokenizer":
        """Read vocab.json and merges.txt, or tokenizer.json, and the padding token's name."""
        folder = Path(folder)
        source = folder / "vocab.json"
        if source.is_file() and (folder / "merges.txt").is_file():
            vocab: object = read_json(source)
            lines = read_lines(folder / "merges.txt")
            merges = [line for line in lines if line and not line.startswith("#version")]
        elif (source := folder / "tokenizer.json").is_file():
            model = read_json(source).get("model")
            model = model if isinstance(model, dict) else {}
            vocab, merges = model.get("vocab"), model.get("merges", [])
        else:
            raise ModelError(
                f"{folder} has no tokenizer: expected vocab.json and merges.txt, or tokenizer.json"
            )
        try:
            return cls(_as_vocab(vocab), _as_pairs(merges), _pad_token(folder))
        except ModelError as error:
            raise ModelError(f"{source}: {error}") from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the published layout whole: a reader sees the old folder or the new."""
        write_whole(folder, self._write)

    def _write(self, folder: Path) -> None:
        by_id = dict(sorted(self.vocab.items(), key=lambda item: item[1]))
        (folder / "vocab.json").write_text(
            json.dumps(by_id, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        lines = [_MERGES_HEADER, *(f"{left} {right}" for left, right in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        special = {
            "bos_token": BOS_TOKEN,
            "eos_token": EOS_TOKEN,
            "unk_token": EOS_TOKEN,
            "pad_token": self.pad_token,
        }
        write_json(folder / "special_tokens_map.json", special)
        config: dict[str, Any] = {
            **special,
            "tokenizer_class": "CLIPTokenizer",
            "do_lower_case": True,
        }
        write_json(
            folder / "tokenizer_config.json",
            {**config, "add_prefix_space": False, "errors": "replace"},
        )


def _as_vocab(vocab: object) -> dict[str, int]:
    """The published files' table of tokens and ids, checked."""
    if not isinstance(vocab, dict):
        raise ModelError("the tokenizer has no vocabulary: expected tokens and their ids")
    odd = [
        token for token, index in vocab.items() if type(index) is not int or not 0 <= index < 2**31
    ]
    if odd:
        raise ModelError(
            f"the tokenizer's vocabulary gives {odd[0]!r} the id {vocab[odd[0]]!r}: expected a "
            "whole number of 0 or more"
        )
    return vocab


def _as_pairs(merges: object) -> Merges:
    """Merges as pairs, from either form that the published files use ("a b" or ["a", "b"])."""
    if not isinstance(merges, list):
        raise ModelError("the tokenizer's merges are no list: expected pairs of tokens")
    pairs: Merges = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not (
            isinstance(parts, list | tuple)
            and len(parts) == 2
            and all(isinstance(part, str) for part in parts)
        ):
            raise ModelError(f"the tokenizer has the merge {str(merge)[:80]!r}: expected a pair")
        pairs.append((parts[0], parts[1]))
    return pairs


def _pad_token(folder: Path) -> str:
    """The padding token that the tokenizer's configs name; the end token when they name none."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            token = read_json(folder / name).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return EOS_TOKEN


def _bytes_by_character() -> list[tuple[int, str]]:
    """(byte, character) pairs of the byte-level alphabet: printable bytes stand for themselves."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in own]
    return [(byte, chr(byte)) for byte in own] + [
        (byte, chr(256 + i)) for i, byte in enumerate(rest)
    ]
