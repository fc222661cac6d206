"""What is wrong with an adapter's files is refused in one error, and nothing changes. Files come from strangers."""

import json
import os
import pickle
import shutil
import signal
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from loradeck import Adapter, Bank, LoraConfig
from loradeck.errors import AdapterError, LoradeckError, UnsupportedError
from loradeck.lora import peft, safetensors_io
from loradeck.lora.manifest import read_folder

CONFIG, TENSORS, INDEX = "adapter_config.json", "adapter_model.safetensors", "adapter_model.safetensors.index.json"
A, B = "base_model.model.linear.lora_A.weight", "base_model.model.linear.lora_B.weight"


class Net(nn.Module):
    """Two layers that are not square: (batch, 6) -> (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.linear = nn.Linear(5, 3)

    def forward(self, x):
        return self.linear(self.first(x).relu())


@pytest.fixture
def bank(fill):
    """A bank with one resident adapter, which every refusal must leave alone."""
    torch.manual_seed(0)
    bank = Bank(Net().eval().requires_grad_(False))
    fill(bank.add("kept", LoraConfig(r=2, target_modules=["first"])), seed=1)
    return bank


@pytest.fixture
def folder(bank, fill, tmp_path) -> Path:
    """A sound adapter of `linear` alone, r=4."""
    fill(bank.add("sound", LoraConfig(r=4, lora_alpha=4, target_modules=["linear"])))
    bank.save("sound", tmp_path / "sound")
    bank.unload("sound")
    return tmp_path / "sound"


@contextmanager
def refused(bank, match: str | None = None, kind: type[LoradeckError] = AdapterError):
    """The block raises an error of ours, and the bank and its model are as they were."""
    x = torch.randn(3, 6)

    def state():
        with torch.no_grad(), bank.route(["kept", None, "kept"]):
            outputs = bank.model(x).tolist()
        return outputs, bank.names(), [(path, sorted(vars(m))) for path, m in bank.model.named_modules()]

    before = state()
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert state() == before
    assert len(str(caught.value)) < 5000


def read_tensors(folder):
    return safetensors.torch.load_file(folder / TENSORS)


def write_tensors(folder, tensors):
    safetensors.torch.save_file(tensors, folder / TENSORS, {"format": "pt"})


def edit_config(folder, **changes):
    table = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**table, **changes}))


def split(folder) -> tuple[dict, bytes]:
    content = (folder / TENSORS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(folder, header: bytes | dict, body: bytes):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(header)) + header + body)


def test_the_sound_one_loads(bank, folder):
    """Otherwise every refusal below would prove nothing."""
    header, body = split(folder)
    join(folder, header, body)
    edit_config(folder)
    assert bank.load(folder) == "sound"
    assert bank.names() == ["kept", "sound"]


class TestDamagedTensors:
    """The safetensors file itself."""

    def test_cut_short_anywhere(self, bank, folder):
        content = (folder / TENSORS).read_bytes()
        body = len(content) - len(split(folder)[1])
        for length in {0, 1, 7, 8, 9, body // 2, body - 1, body, body + 1, len(content) // 2, len(content) - 1}:
            (folder / TENSORS).write_bytes(content[:length])
            with refused(bank, "adapter_model.safetensors"):
                bank.load(folder)

    def test_with_more_at_its_end(self, bank, folder):
        with (folder / TENSORS).open("ab") as file:
            file.write(b"\0")
        with refused(bank, "body"):
            bank.load(folder)

    @pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 17 << 20, 100_000, 0, 1])
    def test_with_a_header_length_that_lies(self, bank, folder, length):
        content = (folder / TENSORS).read_bytes()
        (folder / TENSORS).write_bytes(struct.pack("<Q", length) + content[8:])
        with refused(bank):
            bank.load(folder)

    @pytest.mark.parametrize(
        "header",
        [
            b"", b"[]", b"null", b"{", b'{"a": 1}', b'{"__metadata__": 3}', b"\xff\xfe{}", b'{"\xff": {}}', b"\0" * 64,
            b"[" * 100_000, b'{"a":' * 100_000, b'{"a": {"shape": ' + b"[" * 100_000,
            b'{"a": {"dtype": "F32", "shape": [' + b"9" * 1_000_000 + b'], "data_offsets": [0, 4]}}',
            b'{"__metadata__": {"x": ' + b"9" * 1_000_000 + b"}}", b'{"a": {"shape": [1e999]}}', b'{"\\ud800": {}}',
        ],
        ids=lambda header: repr(header[:24]),
    )  # fmt: skip
    def test_with_a_header_that_is_none(self, bank, folder, header):
        join(folder, header, split(folder)[1])
        with refused(bank):
            bank.load(folder)

    @pytest.mark.parametrize(
        "fields",
        [
            {"dtype": "I64"}, {"dtype": "F8_E4M3"}, {"dtype": "F128"}, {"dtype": 3}, {"dtype": "x" * 10**6}, {"dtype": None},
            {"shape": [5, 4]}, {"shape": [4, 6]}, {"shape": [20]}, {"shape": [4, -5]}, {"shape": [4.5, 5]},
            {"shape": "45"}, {"shape": [2**70, 1]}, {"shape": [2**32, 2**32]}, {"shape": [4, True]}, {"shape": [1] * 99},
            {"data_offsets": [0, 79]}, {"data_offsets": [1, 81]}, {"data_offsets": [80, 0]}, {"data_offsets": [0]},
            {"data_offsets": [0, 80, 90]}, {"data_offsets": [-80, 0]}, {"data_offsets": [2**63, 2**63 + 80]},
            {"data_offsets": None}, {"data_offsets": [0.5, 80.0]}, {"data_offsets": ["0", "80"]},
            {"data_offsets": [10**6, 10**6 + 80]}, {"data_offsets": [48, 128]},
        ],
        ids=lambda fields: str(fields)[:32],
    )  # fmt: skip
    def test_with_an_entry_that_lies(self, bank, folder, fields):
        header, body = split(folder)
        assert header[A]["shape"] == [4, 5]
        header[A].update(fields)
        join(folder, header, body)
        with refused(bank):
            bank.load(folder)

    def test_with_tensors_that_overlap_or_leave_a_gap(self, bank, folder):
        header, body = split(folder)
        assert header[A]["data_offsets"] == [0, 80]
        gap = json.loads(json.dumps(header))
        gap[B]["data_offsets"] = [84, 84 + 48]
        overlap = json.loads(json.dumps(header))
        overlap[B]["data_offsets"] = [76, 76 + 48]
        same = json.loads(json.dumps(header))
        same[B] = dict(header[A], shape=[5, 4])
        twice = json.dumps(header)[:-1] + ', "' + A + '": ' + json.dumps(dict(header[A], data_offsets=[4, 84])) + "}"
        for wrong, content in ((gap, body + b"1234"), (overlap, body[:-4]), (same, body), (twice.encode(), body)):
            join(folder, wrong, content)
            with refused(bank, "overlap|ends? at byte"):
                bank.load(folder)

    def test_shorter_since_its_header_was_read(self, folder):
        listing = read_folder(folder)
        os.truncate(folder / TENSORS, listing.headers[0].body + 10)
        with pytest.raises(AdapterError, match="shorter"):
            Adapter.from_files(listing)


class TestWrongTensors:
    """Sound files that hold the wrong things."""

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_not_finite(self, bank, folder, bad, dtype):
        tensors = {key: tensor.to(dtype) for key, tensor in read_tensors(folder).items()}
        write_tensors(folder, tensors)
        bank.load(folder, "fine")
        bank.unload("fine")
        tensors[B][-1, -1] = bad
        write_tensors(folder, tensors)
        with refused(bank, "lora_B.weight holds NaN or Inf"):
            bank.load(folder)

    def test_not_finite_in_one_of_two_types(self, bank, folder):
        tensors = read_tensors(folder)
        tensors[A] = tensors[A].half()
        tensors[A][0, 0] = float("nan")
        write_tensors(folder, tensors)
        with refused(bank, "lora_A.weight holds NaN or Inf"):
            bank.load(folder)

    @pytest.mark.parametrize("missing", [A, B])
    def test_a_half_is_missing(self, bank, folder, missing):
        tensors = read_tensors(folder)
        del tensors[missing]
        write_tensors(folder, tensors)
        with refused(bank, "linear has [AB] only"):
            bank.load(folder)

    @pytest.mark.parametrize(
        "key",
        [
            "extra", "linear.lora_A.weight", "base_model.model.linear.lora_C.weight", "base_model.model.other.weight",
            "base_model.model.linear.weight", "base_model.model.linear.lora_A", "base_model.model.linear.lora_embedding_A",
            "base_model.model.linear.lora_A.default.weight", "base_model.model.lora_A.weight", "", "base_model.model.",
            "base_model.model.../../x.lora_A.weight", "base_model.model.linear.bias", "x" * 10_000,
        ],
        ids=lambda key: key[-40:],
    )  # fmt: skip
    def test_a_key_too_many(self, bank, folder, key):
        """Also one that would be a copy of a base weight, were it equal to it."""
        write_tensors(folder, {**read_tensors(folder), key: torch.ones(4, 5)})
        with refused(bank):
            bank.load(folder)

    def test_every_problem_is_in_one_error(self, bank, folder):
        """Of a wrong base: shapes, a missing module, and a module of another kind."""
        tensors = {
            "linear.lora_A.weight": torch.ones(4, 7), "linear.lora_B.weight": torch.ones(3, 4),
            "second.lora_A.weight": torch.ones(4, 7), "second.lora_B.weight": torch.ones(3, 4),
            "first.lora_embedding_A": torch.ones(4, 6), "first.lora_embedding_B": torch.ones(5, 4),
        }  # fmt: skip
        write_tensors(folder, {f"base_model.model.{key}": tensor for key, tensor in tensors.items()})
        edit_config(folder, target_modules=["linear", "second", "first"])
        with refused(bank, "does not fit this base") as caught:
            bank.load(folder)
        problems = "\n".join(caught.value.problems)
        assert len(caught.value.problems) == 3
        assert "linear needs A (4, 5) and B (3, 4) here, the adapter has (4, 7) and (3, 4)" in problems
        assert "second is not a module of this base" in problems
        assert "first is a linear layer here, the adapter's is embedding" in problems

    @pytest.mark.parametrize(
        "shapes", [((4, 5), (3, 5)), ((0, 5), (3, 0)), ((4, 5), (3, 4, 1)), ((4,), (3, 4)), ((), (3, 4))]
    )
    def test_shapes_that_are_no_pair(self, bank, folder, shapes):
        write_tensors(folder, {A: torch.ones(shapes[0]), B: torch.ones(shapes[1])})
        with refused(bank, "is incomplete or inconsistent"):
            bank.load(folder)

    def test_empty_tensors_are_said_to_be_a_part_of_a_sharded_training(self, bank, folder):
        """As DeepSpeed's ZeRO-3 leaves them where nobody gathers them first."""
        write_tensors(folder, {A: torch.empty(0), B: torch.empty(0)})
        with refused(bank, r"linear has A \(0,\) and B \(0,\): .* a sharded training saves only one part"):
            bank.load(folder)

    def test_nothing_inside(self, bank, folder):
        write_tensors(folder, {})
        with refused(bank, "no A and no B"):
            bank.load(folder)

    def test_a_giant_copy_of_nothing_costs_no_memory(self, bank, folder):
        """A sparse file of a terabyte takes no disk; its tensor belongs to no weight of the base."""
        header, _ = split(folder)
        size = 1 << 40
        header["base_model.model.nothing.weight"] = {
            "dtype": "F32", "shape": [size // 4], "data_offsets": [128, 128 + size],
        }  # fmt: skip
        join(folder, header, b"")
        with (folder / TENSORS).open("ab") as file:
            file.truncate(file.tell() + 128 + size)
        with refused(bank, "nothing.weight"):
            bank.load(folder)


class TestConfigs:
    """adapter_config.json."""

    @pytest.mark.parametrize(
        "content",
        [
            b"", b"[]", b"null", b"{", b"{'r': 4}", b"\xff\xfe", b'{"peft_type": "LORA", "r": NaN}', b"[" * 200_000,
            b'{"a":' * 200_000, b'{"peft_type": "\xff"}', b'{"r": ' + b"9" * 1_000_000 + b', "peft_type": "LORA"}',
            b'{"peft_type": "LORA", "\\ud800": 1}', b'{"peft_type": "LORA"} x', b" " * (5 << 20), b"{}", b'{"r": 4}',
        ],
        ids=lambda content: repr(content[:24]),
    )  # fmt: skip
    def test_that_is_none(self, bank, folder, content):
        (folder / CONFIG).write_bytes(content)
        with refused(bank, "adapter_config.json"):
            bank.load(folder)

    def test_a_list_is_not_an_object(self, bank, folder):
        (folder / CONFIG).write_bytes(b"[]")
        with refused(bank, r"adapter_config\.json is not a JSON object: "):
            bank.load(folder)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "changes",
        [
            {"r": 5}, {"r": 8, "rank_pattern": {"linear": 5}}, {"rank_pattern": {"lin.*": 2}}, {"r": None}, {"r": 0},
            {"r": -4}, {"r": 4.5}, {"r": "4"}, {"r": True}, {"r": 10**30}, {"r": [4]}, {"lora_alpha": "4"},
            {"lora_alpha": 1e300}, {"lora_alpha": []}, {"lora_dropout": 1.5}, {"lora_dropout": "a"}, {"use_rslora": 1},
            {"rank_pattern": [4]}, {"rank_pattern": {"linear": "4"}}, {"rank_pattern": {"(": 4}}, {"alpha_pattern": {"*": 4}},
            {"alpha_pattern": {"linear": None}}, {"target_modules": 4}, {"target_modules": [4]}, {"target_modules": []},
            {"target_modules": ["first"]}, {"target_modules": "("}, {"peft_type": "IA3"},
            {"peft_type": None}, {"peft_type": ["LORA"]}, {"rank_pattern": {"(?i)LINEAR": 4}}, {"r": 6, "alpha_pattern": {}},
            {"layers_to_transform": "0"}, {"layers_to_transform": [0.5]}, {"use_future": True}, {"exclude_modules": 3},
            {"future_config": {"a": 1}}, {"enable_lora": [True, False]},
        ],
        ids=str,
    )  # fmt: skip
    def test_that_says_what_cannot_be_or_disagrees(self, bank, folder, changes):
        edit_config(folder, **changes)
        with refused(bank, "adapter_config.json|is incomplete or inconsistent"):
            bank.load(folder)

    @pytest.mark.parametrize(
        "changes",
        [
            {"lora_alpha": 8.0}, {"lora_dropout": 0}, {"r": 9, "rank_pattern": {"linear": 4}}, {"target_modules": "all-linear"},
            {"rank_pattern": {"lin.*": 4, "linear": 7}}, {"target_modules": r".*(encoder|linear|x.*)(.*)"}, {"revision": 3},
            {"target_modules": "linear"}, {"task_type": None}, {"future_switch": None}, {"init_lora_weights": "gaussian"},
            {"base_model_name_or_path": None}, {"rank_pattern": None}, {"megatron_core": "megatron.core"}, {"bias": None},
            {"target_modules": ["linear", "v_proj"]}, {"exclude_modules": ["first"]}, {"auto_mapping": {"x": "y"}},
            {"bias": False}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["score"]}, {"merge_weights": True},
            {"enable_lora": None}, {"ensure_weight_tying": True}, {"use_future": False}, {"future_config": {}},
        ],
        ids=str,
    )  # fmt: skip
    def test_that_is_unusual_and_right(self, bank, folder, changes):
        edit_config(folder, **changes)
        bank.load(folder)
        assert bank["sound"].sites["linear"].r == 4

    def test_unknown_settings_that_change_nothing_are_named_once(self, bank, folder, caplog):
        """Of other tools, or of transformers: no switch and no method's settings."""
        unknown = {"task": "chat", "domain": ["law"], "transformers_version": "5.1", "_from_model_config": True, "x": 0}
        edit_config(folder, **unknown)
        bank.load(folder)
        (record,) = caplog.records
        text = record.getMessage()
        assert record.levelname == "WARNING"
        assert text.endswith("_from_model_config, domain, task, transformers_version")
        assert str(folder / CONFIG) in text

    @pytest.mark.parametrize("known", [("r", "lora_alpha"), ("r", "lora_alpha", "target_modules"), ("r",)])
    def test_of_an_old_peft(self, bank, folder, caplog, known):
        """What a file leaves out is PEFT's default, and nothing to warn of."""
        table = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", **{key: table[key] for key in known}}))
        bank.load(folder)
        assert bank["sound"].sites["linear"].scaling == (1 if "lora_alpha" in known else 2)
        assert not caplog.records

    def test_without_a_rank_the_default_is_said_to_be_one(self, bank, folder):
        edit_config(folder, r=None)
        with refused(bank, r"rank 4 in its tensors and no r, so PEFT's default of 8, in adapter_config\.json"):
            bank.load(folder)

    @pytest.mark.parametrize(
        ("change", "text"),
        [({"r": 4.0}, "r is 4.0: "), ({"lora_dropout": "a"}, "lora_dropout is 'a': "), ({"rank_pattern": {"linear": "4"}}, "rank_pattern is {'linear': '4'}: ")],
    )  # fmt: skip
    def test_a_value_of_another_type_is_shown(self, bank, folder, change, text):
        edit_config(folder, **change)
        with refused(bank) as caught:
            bank.load(folder)
        assert f"{CONFIG}: {text}expected " in str(caught.value)

    @pytest.mark.parametrize(
        "pattern",
        [
            "(a+)+b", "(a|a)*b", "a?" * 40 + "a" * 40, "(a|a)" * 40 + "b", ".*" * 8 + "b", "(?x:(a+) +)b", "(.*a){20}b",
            "(?=(a+))a*b", r"[\][](a+)+]", r"(a*)\1b", "a" * 100_000, "(" * 10_000 + ")" * 10_000, "(a{1,200}){1,200}b",
            "x{4294967296}",
        ],
        ids=lambda pattern: pattern[:24],
    )  # fmt: skip
    @pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
    def test_with_a_regex_that_takes_for_ever(self, bank, folder, table, pattern):
        """Every path of the file is held against it, of sixty a's here, and refused if that takes too long."""
        bank.model.add_module("a" * 60, nn.Linear(5, 3))
        paths = {key.replace("linear", "a" * 60): tensor for key, tensor in read_tensors(folder).items()}
        write_tensors(folder, paths)
        edit_config(folder, target_modules="a+", **{table: {pattern: 4}})
        with within(120):
            try:
                bank.load(folder)
            except AdapterError as error:
                assert table in str(error)  # noqa: PT017 - some of them are no regex, or take too long

    def test_with_a_slow_regex_on_a_long_name(self, bank, folder):
        long = {key.replace("linear", "a." * 4000): tensor for key, tensor in read_tensors(folder).items()}
        write_tensors(folder, long)
        edit_config(folder, rank_pattern={".*.*b": 4})
        with within(120), refused(bank):
            bank.load(folder)

    def test_the_first_pattern_counts_even_after_a_file_like_it(self, bank, folder):
        """Two files alike but for the order of their patterns are two files."""
        scalings = []
        for order in (("lin.*", "linear"), ("linear", "lin.*")):
            edit_config(folder, alpha_pattern={key: {"linear": 8, "lin.*": 20}[key] for key in order})
            name = bank.load(folder, order[0].replace("*", "star"))
            scalings.append(bank[name].sites["linear"].scaling)
        assert scalings == [5.0, 2.0]

    def test_a_file_like_one_before_is_read_anew(self, bank, folder, fill):
        """Nothing kept of one load answers for another: values, scalings, metadata, dtypes, bases."""
        bank.load(folder, "first")
        edit_config(folder, lora_alpha=12)
        tensors = read_tensors(folder)
        write_tensors(folder, {key: tensor + 1 for key, tensor in tensors.items()})
        bank.load(folder, "second")
        write_tensors(folder, {key: tensor.half() for key, tensor in tensors.items()})
        bank.load(folder, "third")
        assert [bank[name].sites["linear"].scaling for name in ("first", "second", "third")] == [1.0, 3.0, 3.0]
        for name, wanted in (("first", tensors[A]), ("second", tensors[A] + 1), ("third", tensors[A].half())):
            got = bank[name].pair("linear")[0]
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted)
        for name in bank.names():
            bank.unload(name)
        bank.model.linear = nn.Linear(6, 3)
        with pytest.raises(AdapterError, match="linear needs A"):
            bank.load(folder)


@contextmanager
def within(seconds: int):
    """Fail, and do not hang, when the block takes for ever."""

    def late(*_):
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class TestFolders:
    """Where the files lie, and what else lies there."""

    def test_nothing_there(self, bank, tmp_path):
        with refused(bank, "is not a folder"):
            bank.load(tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        with refused(bank, "holds no adapter_config.json"):
            bank.load(tmp_path / "empty")
        (tmp_path / "file").write_text("x")
        with refused(bank):
            bank.load(tmp_path / "file")

    def test_a_file_of_it(self, bank, folder):
        for file in (folder / TENSORS, folder / CONFIG):
            with refused(bank, "is a file, not an adapter's folder") as caught:
                bank.load(file, "named")
            assert caught.value.hint == f"Give its folder: {folder}"

    def test_the_folder_above(self, bank, folder, tmp_path):
        """Of PEFT's several adapters, of a Trainer's run with its checkpoints, or of a store."""
        for name in ("checkpoint-500", "checkpoint-1000", "checkpoint-90", ".hidden"):
            shutil.copytree(folder, tmp_path / "run" / name)
        (tmp_path / "run" / "logs").mkdir()
        with refused(bank, "holds no adapter_config.json itself, but folders with adapters") as caught:
            bank.load(tmp_path / "run")
        assert "checkpoint-90, checkpoint-500, checkpoint-1000" in str(caught.value)
        assert ".hidden" not in str(caught.value)
        assert caught.value.hint == f"Give one of them, such as {tmp_path / 'run' / 'checkpoint-1000'}"
        bank.load(tmp_path / "run" / "checkpoint-1000", "last")
        for i in range(20):
            shutil.copytree(folder, tmp_path / "run" / f"poet-{i}")
        with refused(bank, r"adapters: 23, the last of them poet-17, poet-18, poet-19"):
            bank.load(tmp_path / "run")

    @pytest.mark.parametrize("file", [CONFIG, TENSORS, INDEX])
    def test_a_pointer_of_git_lfs(self, bank, folder, file):
        if file == INDEX:
            (folder / TENSORS).unlink()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9437184\n"
        (folder / file).write_text(pointer)
        with refused(bank, f"{file} is a Git LFS pointer") as caught:
            bank.load(folder)
        assert "git lfs pull" in caught.value.hint

    def test_no_tensors(self, bank, folder):
        (folder / TENSORS).unlink()
        with refused(bank, "holds no adapter_model.safetensors"):
            bank.load(folder)

    def test_a_pickle_is_never_opened(self, bank, folder, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "exploded",))

        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
        bank.load(folder, "beside a sound file")
        bank.unload("beside a sound file")
        (folder / TENSORS).unlink()
        with refused(bank, "pickle", UnsupportedError) as caught:
            bank.load(folder)
        assert f"loradeck convert {folder / 'adapter_model.bin'} -o NEW" in caught.value.cli
        (folder / TENSORS).write_bytes(pickle.dumps(Bomb()))
        with refused(bank):
            bank.load(folder)
        assert not (tmp_path / "exploded").exists()

    @pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 300, ""])
    def test_a_path_that_cannot_be(self, bank, path):
        for name in (None, "named"):
            with refused(bank, kind=LoradeckError):
                bank.load(path, name)

    def test_symlinks_are_followed_as_in_the_hubs_cache(self, bank, folder, tmp_path):
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
        folder.rename(blobs)
        snapshot.mkdir()
        for file in (CONFIG, TENSORS):
            (snapshot / file).symlink_to(Path("..") / "blobs" / file)
        (tmp_path / "link").symlink_to(snapshot)
        assert bank.load(tmp_path / "link") == "snapshot"
        (snapshot / TENSORS).unlink()
        (snapshot / TENSORS).symlink_to(TENSORS)
        with refused(bank):
            bank.load(snapshot, "loop")

    @pytest.mark.parametrize("file", [CONFIG, TENSORS])
    def test_what_is_no_file(self, bank, folder, file):
        (folder / file).unlink()
        (folder / file).mkdir()
        with refused(bank):
            bank.load(folder)
        (folder / file).rmdir()
        os.mkfifo(folder / file)
        with within(5), refused(bank):
            bank.load(folder)


class TestShards:
    """An index and its shards."""

    @pytest.fixture
    def shards(self, folder):
        tensors = read_tensors(folder)
        for key, file in ((A, "a.safetensors"), (B, "b.safetensors")):
            safetensors.torch.save_file({key: tensors[key]}, folder / file, {"format": "pt"})
        (folder / TENSORS).unlink()
        (folder / INDEX).write_text(
            json.dumps({"metadata": {}, "weight_map": {A: "a.safetensors", B: "b.safetensors"}})
        )
        return folder

    def test_they_are_one_adapter(self, bank, shards, tmp_path):
        bank.load(shards)
        assert bank["sound"].nbytes == 128
        again = read_tensors(bank.save("sound", tmp_path / "again"))
        for key, file in ((A, "a.safetensors"), (B, "b.safetensors")):
            assert torch.equal(again[key], safetensors.torch.load_file(shards / file)[key])

    @pytest.mark.parametrize(
        "name",
        ["../sound/b.safetensors", "/etc/b.safetensors", "b\0.safetensors", "none.safetensors", "a.safetensors", "", "..",
         "adapter_config.json", "sub/b.safetensors", 3, None, ["b.safetensors"], "b.safetensors\n"],
    )  # fmt: skip
    def test_a_shard_that_is_none(self, bank, shards, name):
        (shards / INDEX).write_text(json.dumps({"weight_map": {A: "a.safetensors", B: name}}))
        with refused(bank):
            bank.load(shards)

    @pytest.mark.parametrize(
        "content",
        [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}', b"\xff", b"[" * 200_000, b'{"a":' * 200_000],
    )
    def test_an_index_that_is_none(self, bank, shards, content):
        (shards / INDEX).write_bytes(content)
        with refused(bank, "index"):
            bank.load(shards)

    def test_one_tensor_in_two_shards(self, bank, shards):
        (shards / "b.safetensors").write_bytes((shards / "a.safetensors").read_bytes())
        with refused(bank, "another shard"):
            bank.load(shards)


class TestBases:
    """An adapter remembers the base it was trained on."""

    def save(self, bank, folder, **provenance):
        bank.load(folder, "temporary", trainable=True)
        bank.model.fingerprint = "a" * 64
        bank.add("stamped", LoraConfig(r=4, target_modules=["linear"]))
        bank.save("stamped", folder.with_name("stamped"), **provenance)
        bank.unload("temporary")
        bank.unload("stamped")
        return folder.with_name("stamped")

    @pytest.mark.parametrize("provenance", [{}, {"steps": "3"}, {"steps": 3}, {"note": "ünï\n\"'"}], ids=str)
    def test_another_base_is_refused(self, bank, folder, provenance):
        stamped = self.save(bank, folder, **provenance)
        bank.load(stamped)
        bank.unload("stamped")
        bank.model.fingerprint = "b" * 64
        with refused(bank, "another base") as caught:
            bank.load(stamped)
        assert "a" * 12 in str(caught.value)
        assert "b" * 12 in str(caught.value)
        assert bank.load(stamped, any_base=True) == "stamped"

    @pytest.mark.parametrize(("theirs", "ours"), [("Q4_1", None), (None, "Q4_K, Q6_K"), ("Q8_0", "Q4_1")])
    def test_a_quantised_one_may_be_the_same_base(self, bank, folder, caplog, theirs, ours):
        bank.model.base_quantisation = theirs
        stamped = self.save(bank, folder)
        with safetensors.safe_open(stamped / TENSORS, "pt") as file:
            assert json.loads(file.metadata()["loradeck"]).get("base_quantisation") == theirs
        bank.model.base_quantisation = ours
        bank.load(stamped)
        assert not caplog.records
        bank.unload("stamped")
        bank.model.fingerprint = "b" * 64
        assert bank.load(stamped) == "stamped"
        (record,) = caplog.records
        text = record.getMessage()
        assert record.levelname == "WARNING"
        assert all(each in text for each in (*filter(None, (theirs, ours)), "a" * 12, "b" * 12, "another base"))
        bank.unload("stamped")
        bank.load(stamped, any_base=True)
        assert len(caplog.records) == 1

    def test_but_not_if_a_shape_differs(self, bank, folder, caplog):
        bank.model.base_quantisation = "Q4_1"
        stamped = self.save(bank, folder)
        bank.model.fingerprint = "b" * 64
        bank.detach()
        bank.model.linear = nn.Linear(3, 5)
        bank = Bank(bank.model)
        with pytest.raises(AdapterError, match="does not fit this base"):
            bank.load(stamped)
        assert not caplog.records

    def test_without_a_record_on_either_side(self, bank, folder):
        stamped = self.save(bank, folder)
        del bank.model.fingerprint
        bank.load(stamped)
        bank.model.fingerprint = "b" * 64
        write_tensors(folder, read_tensors(folder))
        bank.load(folder)

    @pytest.mark.parametrize(
        "record", ["", "x", "[]", "3", "[" * 100_000, '{"base_fingerprint": 3}', '{"base_fingerprint": null}']
    )
    def test_a_record_that_is_none(self, bank, folder, record):
        bank.model.fingerprint = "b" * 64
        safetensors.torch.save_file(read_tensors(folder), folder / TENSORS, {"format": "pt", "loradeck": record})
        if "3}" in record:
            with refused(bank, "another base"):
                bank.load(folder)
        else:
            bank.load(folder)

    def test_the_record_survives(self, bank, folder, tmp_path):
        stamped = self.save(bank, folder, data="123")
        with safetensors.safe_open(stamped / TENSORS, "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        record = json.loads(metadata["loradeck"])
        assert record["base_fingerprint"] == "a" * 64
        assert record["data"] == "123"
        bank.load(stamped)
        again = bank.save("stamped", tmp_path / "again")
        assert (again / TENSORS).read_bytes() == (stamped / TENSORS).read_bytes()


class TestFormat:
    """Our safetensors are the safetensors package's."""

    TENSORS = {
        "b": torch.randn(3, 4), "a": torch.randn(5), "z": torch.randn(2, 2).double(), "m": torch.randn(7).bfloat16(),
        "n": torch.randn(1, 3, 1).half(), "é\n\"": torch.randn(1), "k": torch.tensor(3.0), "l": torch.randn(3).half(),
        "e": torch.zeros(0, 4),
    }  # fmt: skip

    def encode(self, tensors, metadata):
        names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        return safetensors_io.encode(
            [
                (key, names[t.dtype], tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes())
                for key, t in tensors.items()
            ],
            metadata,
        )

    def test_equal_bytes(self, tmp_path):
        safetensors.torch.save_file(self.TENSORS, tmp_path / "theirs", {"format": "pt"})
        assert self.encode(self.TENSORS, {"format": "pt"}) == (tmp_path / "theirs").read_bytes()

    def test_they_read_ours_and_we_read_theirs(self, tmp_path):
        metadata = {"format": "pt", "x": "ÿ\0"}
        (tmp_path / "ours").write_bytes(self.encode(self.TENSORS, metadata))
        safetensors.torch.save_file(self.TENSORS, tmp_path / "theirs", metadata)
        for path in (tmp_path / "ours", tmp_path / "theirs"):
            loaded = safetensors.torch.load_file(path)
            assert loaded.keys() == self.TENSORS.keys()
            assert all(torch.equal(loaded[key], tensor) for key, tensor in self.TENSORS.items())
            header = safetensors_io.read_header(path)
            assert header.metadata == metadata
            assert {key: entry.shape for key, entry in header.entries.items()} == {
                key: tuple(tensor.shape) for key, tensor in self.TENSORS.items()
            }
            body = bytearray(header.size)
            safetensors_io.read_body(header, memoryview(body))
            entry = header.entries["z"]
            assert bytes(body[entry.begin : entry.end]) == self.TENSORS["z"].numpy().tobytes()

    def test_null_is_no_metadata(self, tmp_path):
        """As mlx writes it."""
        content = self.encode(self.TENSORS, {})
        length = int.from_bytes(content[:8], "little")
        text = content[8 : 8 + length].replace(b'"__metadata__":{}', b'"__metadata__":null')
        (tmp_path / "theirs").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        assert safetensors.torch.load_file(tmp_path / "theirs").keys() == self.TENSORS.keys()
        header = safetensors_io.read_header(tmp_path / "theirs")
        assert (header.metadata, header.entries.keys()) == ({}, self.TENSORS.keys())

    def test_every_tensor_lies_aligned(self, tmp_path):
        (tmp_path / "ours").write_bytes(self.encode(self.TENSORS, {"a": "b" * 5}))
        header = safetensors_io.read_header(tmp_path / "ours")
        assert header.body % 8 == 0
        assert all(entry.begin % safetensors_io.ITEM_BYTES[entry.dtype] == 0 for entry in header.entries.values())


class TestSaving:
    """What must not be written is not, and what lies there stays."""

    def test_what_is_not_finite_is_not_saved(self, bank, folder):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        bank.load(folder, "broken", trainable=True)
        with torch.no_grad():
            next(bank.parameters("broken"))[0, 0] = float("nan")
        with refused(bank, "holds NaN or Inf"):
            bank.save("broken", folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_other_files_stay(self, bank, folder):
        (folder / "notes").mkdir()
        (folder / "notes" / "a.txt").write_text("mine")
        (folder / "README.md").write_text("my own card")
        bank.save("kept", folder)
        assert (folder / "notes" / "a.txt").read_text() == "mine"
        assert (folder / "README.md").read_text() == "my own card"
        assert read_tensors(folder).keys() == {key.replace("linear", "first") for key in (A, B)}
        assert {path.name for path in folder.parent.iterdir()} == {"sound"}

    def test_where_it_cannot_be_written(self, bank, folder, tmp_path):
        (tmp_path / "file").write_text("x")
        with refused(bank, "is a file"):
            bank.save("kept", tmp_path / "file")
        with refused(bank, "cannot be written"):
            bank.save("kept", tmp_path / "file" / "below")
        with refused(bank, kind=LoradeckError):
            bank.save("kept", "a\0b")
        assert (tmp_path / "file").read_text() == "x"

    def test_through_a_symlink(self, bank, folder, tmp_path):
        (tmp_path / "link").symlink_to(folder)
        bank.save("kept", tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert read_tensors(folder).keys() == {key.replace("linear", "first") for key in (A, B)}

    def test_file_modes_follow_the_umask(self, bank, tmp_path):
        umask = os.umask(0o022)
        os.umask(umask)
        bank.save("kept", tmp_path / "new")
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~umask
        assert (tmp_path / "new" / TENSORS).stat().st_mode & 0o777 == 0o666 & ~umask

    def test_a_card_is_valid_front_matter(self, bank, folder, tmp_path):
        """Whatever a stranger's config names as its base."""
        edit_config(folder, base_model_name_or_path="x\nlicense: evil\n---\n# owned")
        bank.load(folder)
        card = (bank.save("sound", tmp_path / "again") / "README.md").read_text()
        front = card.split("---\n")[1]
        assert "license" not in [line.split(":")[0] for line in front.splitlines()]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
QUIET = settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def _valid_file() -> bytes:
    tensors = [(key, "F32", (2, 3), bytes(range(24))) for key in (A, B)]
    return safetensors_io.encode(tensors, {"format": "pt"})


class TestFuzz:
    """Whatever the bytes: an error of ours, or a result that holds together."""

    def header(self, path, content):
        path.write_bytes(content)
        try:
            header = safetensors_io.read_header(path)
        except LoradeckError:
            return
        spans = sorted((entry.begin, entry.end) for entry in header.entries.values())
        assert [0, *(end for _, end in spans)] == [*(begin for begin, _ in spans), header.size]
        assert header.body + header.size == len(content)
        safetensors.safe_open(path, "pt")  # what we accept, the package accepts

    @QUIET
    @given(st.binary(max_size=64))
    def test_headers_of_noise(self, tmp_path, content):
        self.header(tmp_path / "f", content)

    @QUIET
    @given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 8))
    def test_headers_with_flipped_bytes(self, tmp_path, flips, cut):
        content = bytearray(_valid_file())
        for at, value in flips:
            content[at % len(content)] = value
        self.header(tmp_path / "f", bytes(content[: len(content) - cut]))

    ENTRY = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "F16", "I8"]) | JSON,
            "shape": st.lists(st.integers(-1, 3), max_size=3) | JSON,
            "data_offsets": st.lists(st.integers(-4, 30), max_size=3) | JSON,
        },
    )

    @QUIET
    @given(st.dictionaries(st.sampled_from([A, B, "__metadata__", "x"]), ENTRY | JSON, max_size=3), st.integers(0, 40))
    @example({A: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 4)
    def test_headers_of_json(self, tmp_path, table, size):
        header = json.dumps(table).encode()
        self.header(tmp_path / "f", struct.pack("<Q", len(header)) + header + bytes(size))

    KEYS = sorted(peft.READ | peft.ORIGIN | peft.REFUSED.keys() | {"peft_type", "x"})

    @QUIET
    @given(st.dictionaries(st.sampled_from(KEYS), JSON | st.sampled_from(["LORA", "none", 1, 1.5]), max_size=6))
    @example({"r": 4, "target_modules": ["q"]})
    def test_configs_of_json(self, tmp_path, table):
        (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", **table}))
        try:
            config, _ = peft.read_config(tmp_path)
        except LoradeckError as error:
            str(error)
        else:
            assert 1 <= config.r <= 65_536
            config.scaling("model.layers.0.q_proj")

    @QUIET
    @given(st.dictionaries(st.text(max_size=12), st.integers(1, 8), max_size=3), st.text(max_size=12))
    def test_patterns(self, tmp_path, patterns, path):
        (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "rank_pattern": patterns}))
        try:
            config, _ = peft.read_config(tmp_path)
        except LoradeckError:
            return
        assert 1 <= config.rank(path) <= 8

    @QUIET
    @given(st.binary(max_size=40))
    def test_configs_of_noise(self, tmp_path, content):
        (tmp_path / CONFIG).write_bytes(content)
        with pytest.raises(LoradeckError):
            peft.read_config(tmp_path)
