"""What a device reads: its own files, damaged or forged, and the patches that a server sends into them."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import corpus
import numpy as np
import torch
from file_targets import joined, listing, mutate_header, mutate_text, parted, unchanged
from mutation import mutate_json
from safetensors import SafetensorError
from safetensors.numpy import load, save
from targets import MIB, Broken, Havoc, Target, same
from wire_targets import difference, mutate_frame

from fedloom.client import store as store_module
from fedloom.client.mask import hash_mask, read_mask, write_mask
from fedloom.client.readers import read_examples
from fedloom.client.store import DeviceStore, Held
from fedloom.client.tensorfile import read_payload, write_payload
from fedloom.protocols.codec import decode
from fedloom.protocols.messages import Patch, Payload, Start, Task
from fedloom.strategies.masked import Keep, covers, slice_patch

RUN: Final = "0123abcd"
_BASE: Final = corpus.SPEC.base_hash


def _patch(since: int, version: int, payload: Payload) -> Patch:
    return Patch(base_hash=_BASE, since=since, version=version, payload=payload)


def digest(tensors: Mapping[str, Any], about: str) -> str:
    """What a file of the store says of itself: this file's own count, beside the store's."""
    whole = hashlib.blake2b(about.encode(), digest_size=32)
    for name, tensor in sorted(tensors.items()):
        whole.update(f"|{name}|{tensor.dtype.str}|{tensor.shape}|".encode() + tensor.tobytes())
    return whole.hexdigest()


class TensorFile:
    """One file of the store, rewritten with a right digest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorfile"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / "v1.safetensors"

    def seeds(self) -> list[bytes]:
        made = []
        for payload in corpus.payloads():
            if payload.scalars is None:
                warm = {name: factor.a for name, factor in payload.factors.items()}
                write_payload(self._path, payload, warm, {"run": RUN, "version": 1})
                made.append(self._path.read_bytes())
        return made

    def check(self, data: bytes) -> None:
        """What is accepted is a payload that can be written again and comes back equal."""
        self._path.write_bytes(data)
        payload, warm, meta = unchanged(self._folder, lambda: read_payload(self._path))
        for factor in payload.factors.values():
            if not (type(factor.alpha) in (int, float) and type(factor.rslora) is bool and factor.scale):
                raise Broken(f"a factor must have a scale, got alpha {factor.alpha!r} and rslora {factor.rslora!r}")
        arrays = [array for factor in payload.factors.values() for array in (factor.b, factor.a)]
        for array in (*arrays, *payload.dense.values(), *warm.values()):
            if array.dtype != np.float32:
                raise Broken(f"tensors must be float32, got {array.dtype}")
        write_payload(self._folder / "again", payload, warm, meta)
        again, rows, _ = read_payload(self._folder / "again")
        difference("payload", again, payload)
        difference("warm", dict(sorted(rows.items())), dict(sorted(warm.items())))

    def mutate(self, data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
        """Bytes, the safetensors header, or tensors and metadata with a right digest."""
        chance = rng.random()
        if chance < 0.15:
            return havoc(data)
        if chance < 0.3:
            return mutate_header(data, rng)
        try:
            tensors = load(data)
            size = int.from_bytes(data[:8], "little")
            about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fedloom"])
        except (ValueError, KeyError, TypeError, SafetensorError, RecursionError):
            return havoc(data)
        if rng.random() < 0.6 or not tensors:
            about = mutate_json(about, rng)
        else:
            _mutate_tensors(tensors, rng)
        text = json.dumps(about, sort_keys=True)
        return save(tensors, metadata={"fedloom": text, "digest": digest(tensors, text)})


def _mutate_tensors(tensors: dict[str, Any], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    match rng.randrange(5):
        case 0:
            del tensors[name]
        case 1:
            tensors[rng.choice(("a/q", "b/q", "dense/head", "warm/q", "coefficients", "x"))] = tensors[name]
        case 2:
            tensors[name] = tensors[name].reshape(-1)
        case 3:
            tensors[name] = tensors[name].astype(rng.choice((np.float64, np.int8, np.int64, np.float16, np.bool_)))
        case _ if tensors[name].size:
            tensors[name].reshape(-1)[0] = rng.choice((0, 1, 100))
        case _:
            tensors[name] = np.zeros((0, 3), np.float32)


class Store:
    """The files of a device at version 1 that ended round 3, and what may happen to them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "store"
        self._store = DeviceStore(self._folder / "patches", self._folder / "state")
        self._reset()
        held = self._take(_patch(1, 1, Payload()))
        state = self._store.load_state(3, RUN)
        self._paths = sorted(path for path in self._folder.rglob("*") if path.is_file())
        self._whole = [path.read_bytes() for path in self._paths]
        self._written = (held, state)

    def _reset(self) -> None:
        store_module._cache.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._take(_patch(0, 1, corpus.model_payload(seed=3)))
        self._store.save_state(3, RUN, corpus.model_payload(seed=4))

    def _restore(self) -> None:
        """The files as they were, without waiting for the disk."""
        store_module._cache.clear()
        for path in self._folder.rglob("*"):
            if path.is_file() and path not in self._paths:
                path.unlink()
        for path, data in zip(self._paths, self._whole, strict=True):
            path.write_bytes(data)

    def _take(self, patch: Patch | None, keep: Keep | None = None) -> Held:
        return self._store.take(patch, corpus.PRUNABLE, RUN, keep)

    def seeds_of_files(self) -> list[bytes]:
        return [joined(self._whole)]

    def check_files(self, data: bytes) -> None:
        """Damaged files are refused, or not found, or say what was written."""
        self._restore()
        for path, part in zip(self._paths, parted(data, len(self._paths)), strict=True):
            path.write_bytes(part)
        unchanged(self._folder, lambda: self._ask())

    def _ask(self) -> None:
        self._store.newest_state()
        if self._store.newest_version(RUN) not in (0, 1):
            raise Broken(f"a version must be one that was held, got {self._store.newest_version(RUN)}")
        held, state = self._written
        found = self._store.load_state(3, RUN)
        if found is not None:
            difference("a damaged state", found, state)
        again = self._take(_patch(1, 1, Payload()))
        difference("a damaged patch", again.payload, held.payload)
        difference("damaged warm rows", again.warm, held.warm)

    def mutate_files(self, data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
        parts = parted(data, len(self._paths))
        place = rng.randrange(len(parts))
        if self._paths[place].suffix == ".json":
            parts[place] = mutate_text(parts[place], rng, havoc)
        else:
            parts[place] = havoc(parts[place])
        return joined(parts)

    def seeds_of_patches(self) -> list[bytes]:
        base = Task(device="hospital-a", round=4, rank=2, alpha=4.0, start_from=Start.PATCH, run=RUN)
        patches = [
            _patch(0, 1, corpus.model_payload(seed=5)),
            _patch(0, 2, corpus.model_payload(rank=3)),
            _patch(1, 2, corpus.model_payload(rank=1, seed=6)),
            _patch(1, 1, Payload()),
            _patch(1, 2, Payload()),
            _patch(0, 2, corpus.coefficients(corpus.POOL)),
        ]
        pruned = replace(base, start=Payload(keep=corpus.KEEP))
        slices = [slice_patch(patch, corpus.PRUNABLE, corpus.KEEP) for patch in patches[:-1]]
        tasks = [*(replace(base, patch=patch) for patch in patches), *(replace(pruned, patch=p) for p in slices)]
        return corpus.frames([base, *tasks])

    def check_patch(self, data: bytes) -> None:
        """A patch from the wire: a refused one changes no file, an accepted one fits the model and is still there."""
        task = decode(data, Task, limit=1 << 20)
        self._restore()
        before = listing(self._folder)
        try:
            held = self._take(task.patch, task.start.keep)
        except ValueError:
            same("files after a refusal", listing(self._folder), before)
            raise
        _fits(held.payload)
        if task.patch is None or held.version == 0:
            return
        store_module._cache.clear()
        again = self._take(_patch(held.version, held.version, Payload()), task.start.keep)
        difference("what is held", again.payload, held.payload)
        if not covers(held.keep, task.start.keep):
            raise Broken(f"what is held must have all units of its task, got {dict(held.keep)}")


def _fits(payload: Payload) -> None:
    """Raise Broken unless the model has all that a payload names, in its shapes."""
    spec = corpus.SPEC
    shapes = {name: (factor.b.shape[0], factor.a.shape[1]) for name, factor in payload.factors.items()}
    for name, shape in (*shapes.items(), *((name, array.shape) for name, array in payload.dense.items())):
        matrix = spec.matrices.get(name)
        wanted = (matrix.d_out, matrix.d_in) if matrix else spec.dense.get(name)
        if shape != wanted:
            raise Broken(f"what is held must fit the model, which has {wanted} for {name!r}, got {shape}")


class Mask:
    """A mask's file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "mask"
        self._folder.mkdir(parents=True, exist_ok=True)

    def seeds(self) -> list[bytes]:
        path = self._folder / "mask.safetensors"
        made = []
        for mask in ({"q": torch.tensor([0, 3, 9])}, {"q": torch.arange(5), "head": torch.tensor([1])}):
            write_mask(mask, path)
            made.append(path.read_bytes())
        return made

    def check(self, data: bytes) -> None:
        """What is accepted is a mask: places that rise, under one hash."""
        path = self._folder / "mask.safetensors"
        path.write_bytes(data)
        mask, found = unchanged(self._folder, lambda: read_mask(path))
        for index in mask.values():
            if int(index[0]) < 0:
                raise Broken(f"places of a mask must be >= 0, got {index[:5]}")
        same("a mask's hash", (write_mask(mask, self._folder / "again"), hash_mask(mask)), (found, found))

    def mutate(self, data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
        return mutate_header(data, rng) if rng.random() < 0.5 else havoc(data)


class Examples:
    """Files of examples: the first byte says of which kind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "examples"
        self._folder.mkdir(parents=True, exist_ok=True)

    def seeds(self) -> list[bytes]:
        chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "h\u00f6"}]
        rows: list[dict[str, Any]] = [
            {"prompt": "a", "completion": "b", "who": 7, "label": 2},
            {"messages": chat, "who": "x", "label": "y"},
        ]
        jsonl = "".join(json.dumps(row) + "\n" for row in rows).encode()
        labels = b'{"text": "a", "label": "x", "who": 1}\n\n{"text": "b", "label": 3, "who": null}\n'
        csv = b'\xef\xbb\xbftext,label,who\n"one, two",pos,1\nthree,neg,\n'
        made = [b"\0" + jsonl, b"\4" + jsonl, b"\1" + labels, b"\5" + labels, b"\3" + csv, b"\7" + csv]
        return [*made, b"\2prompt,completion\na,b\n"]

    def check(self, data: bytes) -> None:
        """What is accepted is text that a tokenizer takes."""
        flags = data[0] if data else 0
        path = self._folder / ("data.csv" if flags & 2 else "data.jsonl")
        path.write_bytes(data[1:])
        task: Any = "classify" if flags & 1 else "causal"
        for example in read_examples(path, task=task, key="who" if flags & 4 else ""):
            for text in (example.prompt, example.completion, example.label, example.owner):
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise Broken(f"text of an example must be Unicode, got {text[:100]!r}") from error

    def mutate(self, data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
        if rng.random() < 0.05:
            return bytes([rng.randrange(8)]) + data[1:]
        return data[:1] + mutate_text(data[1:], rng, havoc)


def targets(folder: Path) -> dict[str, Target]:
    """Files go into `folder`."""
    files, store, mask, examples = TensorFile(folder), Store(folder), Mask(folder), Examples(folder)
    made = [
        Target(name="tensorfile", check=files.check, seeds=files.seeds, mutate=files.mutate),
        Target(name="store", check=store.check_files, seeds=store.seeds_of_files, mutate=store.mutate_files),
        Target(
            name="patch",
            check=store.check_patch,
            seeds=store.seeds_of_patches,
            mutate=functools.partial(mutate_frame, kind=Task),
            seconds=6.0,
            memory=280 * MIB,
        ),
        Target(name="mask", check=mask.check, seeds=mask.seeds, mutate=mask.mutate),
        Target(name="examples", check=examples.check, seeds=examples.seeds, mutate=examples.mutate, max_len=1 << 16),
    ]
    return {target.name: target for target in made}
