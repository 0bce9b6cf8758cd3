"""Checkpoints: what is read, what is touched, and every way in which one can be wrong."""

import dataclasses
import json
import mmap
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grokmoe import checkpoint_part
from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.checkpoint_summary import summary
from grokmoe.checkpoint_writer import random_checkpoint, write_checkpoint
from grokmoe.errors import CheckpointError, ConfigError
from grokmoe.layouts import mapped_file
from grokmoe.layouts.safetensors_files import INDEX_FILE, SINGLE_FILE
from grokmoe.model_config import GROK1, TINY
from grokmoe.reference import reference_logits
from tests import goldens

CONFIG = dataclasses.replace(
    TINY,
    hidden_size=16,
    intermediate_size=8,
    head_dim=4,
    vocab_size=32,
    num_experts=3,
    attention_logit_scale=0.5,
)
UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False)
EXPERT = names.expert(1, 2, "linear")
SHARD_BYTES = 3000


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Sound checkpoints that tests copy: single, sharded, untied."""
    root = tmp_path_factory.mktemp("originals")
    random_checkpoint(root / "single", CONFIG, seed=1)
    random_checkpoint(root / "sharded", CONFIG, seed=1, max_shard_bytes=SHARD_BYTES)
    random_checkpoint(root / "untied", UNTIED, seed=1)
    return root


@pytest.fixture
def copy(originals, tmp_path):
    def make(kind="single"):
        return shutil.copytree(originals / kind, tmp_path / kind)

    return make


def read_all(directory, dtype=None):
    with Checkpoint.open(directory) as checkpoint:
        return {name: checkpoint.read(name, dtype) for name in checkpoint.tensors}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def rewrite(directory, change):
    """Passes the tensors of a single-file checkpoint through `change`, which edits the dict in place."""
    tensors = load_file(directory / SINGLE_FILE)
    change(tensors)
    save_file(tensors, directory / SINGLE_FILE)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_header(directory, change, file=SINGLE_FILE):
    """Rewrites the JSON of a safetensors header and leaves the data alone."""
    data = (directory / file).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    (directory / file).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def failure(directory):
    with pytest.raises(CheckpointError) as raised, Checkpoint.open(directory):
        pass
    return str(raised.value)


def assert_names(message, *words):
    assert [word for word in words if str(word) not in message] == [], message


# --- what is read


def test_reads_what_safetensors_reads():
    assert same(read_all(goldens.DIRECTORY), load_file(goldens.DIRECTORY / SINGLE_FILE))


def test_single_and_sharded_are_equal(originals):
    assert len(list((originals / "sharded").glob("*.safetensors"))) > 3
    assert same(read_all(originals / "single"), read_all(originals / "sharded"))


def test_conversion_and_rows(originals):
    with Checkpoint.open(originals / "single") as checkpoint:
        whole = checkpoint.read(EXPERT)
        assert (whole.dtype, whole.shape) == (torch.bfloat16, (8, 16))
        assert torch.equal(checkpoint.read(EXPERT, torch.float32), whole.float())
        for rows in (slice(2, 5), slice(None, 3), slice(6, None), slice(0, 0), slice(7, 99), slice(-2, None)):
            assert torch.equal(checkpoint.read(EXPERT, rows=rows), whole[rows])
        assert checkpoint.read(names.final_norm(), torch.float32, slice(3, 4)).shape == (1,)


def test_a_tensor_outlives_the_checkpoint_and_is_writable(originals):
    with Checkpoint.open(originals / "single") as checkpoint:
        tensor = checkpoint.read(EXPERT)
    before = tensor.clone()
    tensor += 1
    assert not torch.equal(tensor, before)
    assert torch.equal(read_all(originals / "single")[EXPERT], before)
    with pytest.raises(AssertionError, match="closed"):
        checkpoint.read(EXPERT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_types(tmp_path, dtype):
    random_checkpoint(tmp_path, CONFIG, seed=3, dtype=dtype)
    tensors = read_all(tmp_path)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert same(tensors, load_file(tmp_path / SINGLE_FILE))


def test_bfloat16_is_float32_rounded(tmp_path):
    random_checkpoint(tmp_path / "wide", CONFIG, seed=3, dtype=torch.float32)
    random_checkpoint(tmp_path / "narrow", CONFIG, seed=3, dtype=torch.bfloat16)
    assert same(read_all(tmp_path / "wide", torch.bfloat16), read_all(tmp_path / "narrow"))


def test_both_spellings_of_a_gain(copy):
    directory = copy()
    expected = read_all(directory)

    def respell(tensors):
        for name in [name for name in tensors if name.endswith(".scale")]:
            tensors[name.removesuffix("scale") + "weight"] = tensors.pop(name)

    rewrite(directory, respell)
    assert same(read_all(directory), expected)


def test_tied_ignores_a_head_and_untied_reads_it(copy):
    directory = copy("untied")
    with Checkpoint.open(directory) as checkpoint:
        head = checkpoint.read(names.head(checkpoint.config))
        assert not torch.equal(head, checkpoint.read(names.embed()))
        untied_logits = reference_logits(checkpoint, [1, 2, 3])
    edit_json(directory / "config.json", tie_word_embeddings=True)
    with Checkpoint.open(directory) as checkpoint:
        assert names.head(checkpoint.config) == names.embed()
        assert "lm_head.weight" not in checkpoint.tensors
        assert not torch.allclose(reference_logits(checkpoint, [1, 2, 3]), untied_logits)


def test_inv_freq_is_ignored(copy):
    directory = copy()
    rewrite(directory, lambda tensors: tensors.update({"model.layers.0.attn.rotary_emb.inv_freq": torch.ones(2)}))
    with Checkpoint.open(directory) as checkpoint:
        assert not any("inv_freq" in name for name in checkpoint.tensors)


def test_biases_of_zeros_are_skipped(copy):
    """GPTQ's tools add them to matrices that have none."""
    directory = copy()
    expected = read_all(directory)
    biases = {name.removesuffix("weight") + "bias": torch.zeros(8) for name in expected if name.endswith(".weight")}
    rewrite(directory, lambda tensors: tensors.update(biases))
    assert same(read_all(directory), expected)


# --- what is touched


@pytest.fixture
def mapped_ranges(monkeypatch):
    """(offset, length) of every mapping: a process cannot touch a file's bytes through memory it did not map."""
    ranges = []

    class Recorder(mmap.mmap):
        def __new__(cls, descriptor, length, **options):
            ranges.append((options["offset"], length))
            return super().__new__(cls, descriptor, length, **options)

    monkeypatch.setattr(mapped_file.mmap, "mmap", Recorder)
    return ranges


def test_reading_maps_the_bytes_of_that_tensor_alone(mapped_ranges):
    with Checkpoint.open(goldens.DIRECTORY) as checkpoint:
        assert mapped_ranges == []
        stored = checkpoint.tensors[EXPERT]
        checkpoint.read(EXPERT)
        checkpoint.read(EXPERT, rows=slice(64, 128))
    middle = (stored.begin + stored.end) // 2
    for (offset, length), begin in zip(mapped_ranges, (stored.begin, middle), strict=True):
        assert offset + length == stored.end
        assert 0 <= begin - offset < mmap.ALLOCATIONGRANULARITY


def test_the_released_size_opens_from_its_headers(tmp_path):
    """All 631 GB of it, as a file that is one hole: what is never touched need not exist."""
    header, at = {}, 0
    for spec in names.expected(GROK1):
        size = 2 * torch.Size(spec.shape).numel()
        header[spec.name] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path = tmp_path / SINGLE_FILE
    (tmp_path / "config.json").write_text(json.dumps(GROK1.to_dict()))
    name = names.expert(63, 7, "linear")
    begin = 8 + len(text) + header[name]["data_offsets"][0]
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
            file.seek(begin + 100 * 6144 * 2)
            file.write(b"\x80\x3f" * 6144)  # row 100 is all ones
    except OSError as error:
        pytest.skip(f"no sparse files of this size here: {error}")
    with Checkpoint.open(tmp_path) as checkpoint:
        rows = checkpoint.read(name, torch.float32, slice(99, 102))
        assert rows.sum(1).tolist() == [0, 6144, 0]
        assert round(summary(checkpoint).total.parameters / 1e9, 1) == 315.7
    path.unlink()  # pytest keeps tmp_path, and no copy of it should meet a file of this length


def test_a_file_cut_after_opening_is_an_error_and_no_crash(copy):
    directory = copy()
    with Checkpoint.open(directory) as checkpoint:
        last = max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].end)
        with (directory / SINGLE_FILE).open("r+b") as file:
            file.truncate(checkpoint.tensors[last].end - 1)
        with pytest.raises(CheckpointError) as raised:
            checkpoint.read(last)
    assert_names(str(raised.value), last, directory / SINGLE_FILE, "expected", "found")


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_a_file_put_in_its_place_is_an_error_and_no_mixture(copy, originals, kind):
    directory = copy(kind)
    with Checkpoint.open(directory) as checkpoint:
        path = checkpoint.tensors[EXPERT].path
        shutil.copy(path, directory / "copy")
        (directory / "copy").replace(path)
        with pytest.raises(CheckpointError, match="changed or put in its place"):
            checkpoint.read(EXPERT)
        path.unlink()
        with pytest.raises(CheckpointError, match="No such file"):
            checkpoint.read(EXPERT)


def test_no_file_is_kept_open(originals):
    """A checkpoint in a file per layer and expert has more of them than a process may open."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    with Checkpoint.open(originals / "sharded") as checkpoint:
        checkpoint.read(EXPERT)
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_pieces_make_the_tensor(originals):
    with Checkpoint.open(originals / "single") as checkpoint:
        whole = checkpoint.read(EXPERT, torch.float32)
        for max_bytes, lengths in ((1, [1] * 8), (3 * 64, [3, 3, 2]), (10**6, [8])):
            pieces = list(checkpoint.pieces(EXPERT, max_bytes, torch.float32))
            assert [len(piece) for _, piece in pieces] == lengths
            assert torch.equal(torch.cat([piece for _, piece in pieces]), whole)
            assert all(torch.equal(whole[rows], piece) for rows, piece in pieces)


# --- what is there, and what may be missing


def test_a_part_needs_no_other_files(copy):
    directory = copy("sharded")
    index = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
    expected = read_all(directory)
    mine = checkpoint_part.experts(lambda config: {(1, 2)})
    kept = {index[name] for name in index if mine(CONFIG)(name)}
    for path in directory.glob("*.safetensors"):
        if path.name not in kept:
            path.unlink()
    with Checkpoint.open(directory, part=mine) as checkpoint:
        assert torch.equal(checkpoint.read(EXPERT), expected[EXPERT])
        assert set(checkpoint.tensors) == {name for name in index if index[name] in kept}
        with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight.*expected its file, found none"):
            checkpoint.read(names.embed())
    everything = checkpoint_part.attention(checkpoint_part.all_layers)
    for part in (checkpoint_part.whole, checkpoint_part.router, everything):
        with pytest.raises(CheckpointError, match="expected the shard"):
            Checkpoint.open(directory, part=part)


def test_the_last_stage_of_a_tied_model_needs_the_embedding():
    for layers, needed in ((range(1), True), (range(1, 2), True), (range(2), True)):
        assert checkpoint_part.attention(lambda config, layers=layers: layers)(CONFIG)(names.embed()) == needed
    middle = dataclasses.replace(CONFIG, num_layers=3)
    assert not checkpoint_part.attention(lambda config: range(1, 2))(middle)(names.embed())


def test_parts_have_everything_once():
    expected = {spec.name for spec in names.expected(UNTIED)}
    parts = [
        {name for name in expected if part(UNTIED)(name)}
        for part in (
            checkpoint_part.router,
            checkpoint_part.attention(lambda config: range(1)),
            checkpoint_part.attention(lambda config: range(1, 2)),
            checkpoint_part.experts(lambda config: {(0, 0), (0, 1), (0, 2)}),
            checkpoint_part.experts(lambda config: {(1, 0), (1, 1), (1, 2)}),
        )
    ]
    assert sorted(name for part in parts for name in part) == sorted(expected)
    assert parts[0] == {names.gate(0), names.gate(1)}
    assert names.embed() in parts[1]
    assert {names.final_norm(), "lm_head.weight"} <= parts[2]
    assert parts[3] == {names.expert(0, e, linear) for e in range(3) for linear in names.EXPERT_LINEARS}


# --- what can be wrong with the tensors


def removed(name):
    return lambda tensors: tensors.pop(name)


def replaced(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


BIAS = "model.layers.0.attn.q_proj.bias"
LAYER_2 = names.norm(2, "pre_attn_norm")
EXPERT_3 = names.expert(0, 3, "linear")
WRONG_TENSORS = {
    "missing": (removed(EXPERT), EXPERT, "[8, 16]", "no such tensor"),
    "missing norm": (removed("model.norm.scale"), "model.norm.scale", "[16]", "no such tensor"),
    "missing embedding": (removed(names.embed()), names.embed(), "[32, 16]", "no such tensor"),
    "surplus": (replaced("model.extra", torch.ones(3)), "model.extra", "no tensor", "F32 [3]"),
    "bias": (
        replaced(BIAS, torch.eye(3)[2]),
        BIAS,
        "no tensor of this name, or one of zeros",
        "F32 [3] with other values",
    ),
    "bias of integers": (replaced(BIAS, torch.zeros(3, dtype=torch.int32)), BIAS, "no tensor", "I32 [3]"),
    "bias of nothing": (
        replaced("model.layers.0.attn.bias", torch.zeros(3)),
        "model.layers.0.attn.bias",
        "no tensor",
        "",
    ),
    "transposed": (replaced(EXPERT, torch.ones(16, 8)), EXPERT, "[8, 16] (intermediate_size", "[16, 8]"),
    "too many dimensions": (replaced(EXPERT, torch.ones(1, 8, 16)), EXPERT, "[8, 16]", "[1, 8, 16]"),
    "scalar": (replaced("model.norm.scale", torch.tensor(1.0)), "model.norm.scale", "[16]", "shape []"),
    "integers": (replaced(EXPERT, torch.ones(8, 16, dtype=torch.int8)), EXPERT, "F32 or BF16 or F16", "I8"),
    "doubles": (replaced(EXPERT, torch.ones(8, 16, dtype=torch.float64)), EXPERT, "F32 or BF16 or F16", "F64"),
    "fp8": (replaced(EXPERT, torch.ones(8, 16).to(torch.float8_e4m3fn)), f"{EXPERT}_scale", "one float", "is F8_E4M3"),
    "surplus layer": (replaced(LAYER_2, torch.ones(16)), LAYER_2, "num_hidden_layers is 2", "tensors of layer 2"),
    "surplus expert": (replaced(EXPERT_3, torch.ones(8, 16)), EXPERT_3, "num_experts is 3", "tensors of expert 3"),
    "two spellings": (replaced("model.norm.weight", torch.ones(16)), "model.norm.", "one tensor", "one more"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors(copy, case):
    change, tensor, expected, found = WRONG_TENSORS[case]
    directory = copy()
    rewrite(directory, change)
    message = failure(directory)
    assert_names(message, f"tensor {tensor}", directory / SINGLE_FILE)
    wanted, _, got = message.partition(", found ")
    assert expected in wanted.partition("expected ")[2]
    assert found in got


@pytest.mark.parametrize(
    ("changes", "tensor", "expected", "found"),
    [
        ({"num_hidden_layers": 1}, "model.layers.1.", "num_hidden_layers is 1", "tensors of layer 1"),
        ({"num_hidden_layers": 9}, "model.layers.1.", "num_hidden_layers is 9", "2 layers"),
        ({"num_hidden_layers": 10**9}, "model.layers.1.", "num_hidden_layers is 1000000000", "no tensor of layer 2"),
        ({"num_experts": 2}, "experts.2.", "num_experts is 2", "tensors of expert 2"),
        ({"num_experts": 4}, "experts.2.", "num_experts is 4", "3 experts"),
        ({"vocab_size": 64}, names.embed(), "[64, 16] (vocab_size, hidden_size", "[32, 16]"),
        ({"hidden_size": 32}, names.embed(), "[32, 32]", "[32, 16]"),
        ({"intermediate_size": 16}, names.expert(0, 0, "linear"), "[16, 16] (intermediate_size", "[8, 16]"),
        ({"num_key_value_heads": 4}, names.attention(0, "k_proj"), "num_key_value_heads * head_dim", "[8, 16]"),
        ({"head_dim": 8}, names.attention(0, "q_proj"), "[32, 16]", "[16, 16]"),
        ({"tie_word_embeddings": False}, "lm_head.weight", "[32, 16]", "tie_word_embeddings is false"),
    ],
    ids=str,
)
def test_a_config_that_disagrees_with_the_tensors(copy, changes, tensor, expected, found):
    directory = copy()
    edit_json(directory / "config.json", **changes)
    assert_names(failure(directory), tensor, directory / SINGLE_FILE, "expected ", expected, ", found ", found)


def test_errors_in_the_config_itself(copy):
    directory = copy()
    edit_json(directory / "config.json", hidden_size="wide")
    with pytest.raises(ConfigError, match=r"config\.json: hidden_size"):
        Checkpoint.open(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ConfigError, match="no such file"):
        Checkpoint.open(directory)


# --- what can be wrong with a file


@pytest.mark.parametrize(
    ("content", "expected", "found"),
    [
        (b"", "at least 8 bytes", "0 bytes (truncated)"),
        (b"\x02\0\0", "at least 8 bytes", "3 bytes (truncated)"),
        (b"\x10" + b"\0" * 7 + b"{}", "at least 24 bytes", "10 bytes (truncated)"),
        (b"\xff" * 8 + b"{}", "a header of at most", str(2**64 - 1)),
        (b"\x02" + b"\0" * 7 + b"{]", "JSON", "JSONDecodeError"),
        (b"\x02" + b"\0" * 7 + b"\xff\xfe", "JSON", "Unicode"),
        (b"\x02" + b"\0" * 7 + b"[]", "a JSON object", "list"),
        (b"\xa0\x86\x01\0\0\0\0\0" + b"[" * 100000, "JSON", "RecursionError"),
        (b"\x0d" + b"\0" * 7 + b'{"a":1,"a":2}', "JSON", "'a' occurs twice"),
        (b"\x80\x04\x95pickle..", "a header of at most", ""),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else None,
)
def test_a_file_that_is_no_safetensors(copy, content, expected, found):
    directory = copy()
    (directory / SINGLE_FILE).write_bytes(content)
    assert_names(failure(directory), directory / SINGLE_FILE, expected, ", found ", found)


@pytest.mark.parametrize("missing_bytes", [1, 100, 5000])
def test_truncated_data(copy, missing_bytes):
    directory = copy()
    data = (directory / SINGLE_FILE).read_bytes()
    (directory / SINGLE_FILE).write_bytes(data[:-missing_bytes])
    message = failure(directory)
    assert_names(message, "tensor model.", directory / SINGLE_FILE, "expected a file of at least", "truncated")
    assert_names(message, f"found {len(data) - missing_bytes} bytes")


def test_bytes_left_over(copy):
    directory = copy()
    with (directory / SINGLE_FILE).open("ab") as file:
        file.write(b"more")
    assert_names(failure(directory), directory / SINGLE_FILE, "where the last tensor ends", ", found ")


ENTRY = {"dtype": "BF16", "shape": [8, 16], "data_offsets": [0, 256]}


@pytest.mark.parametrize(
    ("change", "expected", "found"),
    [
        (1, "dtype, shape", "1"),
        ({"dtype": 5}, "dtype, shape", "'dtype': 5"),
        ({"shape": "8x16"}, "dtype, shape", "8x16"),
        ({"shape": [8, -16]}, "dtype, shape", "-16"),
        ({"shape": [True, 16]}, "dtype, shape", "True"),
        ({"data_offsets": [256, 0]}, "ascending data_offsets", "[256, 0]"),
        ({"data_offsets": [0]}, "two ascending data_offsets", "[0]"),
        ({"data_offsets": [-256, 0]}, "ascending data_offsets", "-256"),
        ({"data_offsets": [0, 10**30]}, "a file of at least", "truncated"),
        ({"data_offsets": [0, 255]}, "256 bytes for BF16 [8, 16]", "255 bytes"),
        ({"shape": [10**20, 16]}, "bytes for BF16", "256 bytes"),
        ({"data_offsets": [0, 256]}, "data at byte", "overlaps"),
    ],
    ids=str,
)
def test_a_header_entry_that_is_wrong(copy, change, expected, found):
    directory = copy()

    def edit(header):
        header[EXPERT] = ENTRY | change if isinstance(change, dict) else change

    edit_header(directory, edit)
    assert_names(failure(directory), "tensor model.", directory / SINGLE_FILE, "expected ", expected, ", found ", found)


def test_a_gap_between_tensors(copy):
    directory = copy()
    edit_header(directory, lambda header: header.pop(EXPERT))
    assert_names(failure(directory), "tensor model.", directory / SINGLE_FILE, "expected ", ", found ", "gap")


# --- what can be wrong with shards


def shard_of(directory, name):
    return json.loads((directory / INDEX_FILE).read_text())["weight_map"][name]


def edit_index(directory, change):
    index = json.loads((directory / INDEX_FILE).read_text())
    change(index["weight_map"])
    (directory / INDEX_FILE).write_text(json.dumps(index))


def test_an_absent_shard(copy):
    directory = copy("sharded")
    shard = shard_of(directory, EXPERT)
    (directory / shard).unlink()
    assert_names(failure(directory), "tensor model.", directory / shard, "expected the shard", "found no such file")


def test_a_truncated_shard(copy):
    directory = copy("sharded")
    path = directory / shard_of(directory, EXPERT)
    path.write_bytes(path.read_bytes()[:-1])
    assert_names(failure(directory), "tensor model.", path, "expected ", "truncated")


def test_a_tensor_in_two_shards(copy):
    directory = copy("sharded")
    twin, path = directory / shard_of(directory, EXPERT), directory / shard_of(directory, names.embed())
    tensors = load_file(path)
    save_file(tensors | {EXPERT: load_file(twin)[EXPERT]}, path)
    assert_names(failure(directory), f"tensor {EXPERT}", path.name, twin.name, "expected one tensor", "found one more")


def test_an_index_and_headers_that_disagree(copy):
    directory = copy("sharded")
    other = shard_of(directory, names.embed())
    actual = shard_of(directory, EXPERT)
    edit_index(directory, lambda weight_map: weight_map.update({EXPERT: other}))
    assert_names(failure(directory), f"tensor {EXPERT}", other, "expected the tensor", f"found {EXPERT} in {actual}")
    edit_index(directory, lambda weight_map: weight_map.pop(EXPERT))
    assert_names(failure(directory), f"tensor {EXPERT}", actual, "expected an entry", INDEX_FILE, "found none")
    edit_index(directory, lambda weight_map: weight_map.update({EXPERT: actual, "model.ghost": actual}))
    assert_names(failure(directory), "tensor model.ghost", actual, "expected the tensor", "found none there")


@pytest.mark.parametrize("target", ["../x.safetensors", "/etc/passwd", "", "..", 5, None, "a\0b"], ids=repr)
def test_an_index_cannot_point_elsewhere(copy, target):
    directory = copy("sharded")
    edit_index(directory, lambda weight_map: weight_map.update({EXPERT: target}))
    assert_names(failure(directory), f"tensor {EXPERT}", INDEX_FILE, "expected the name of a file", repr(target))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'], ids=repr)
def test_an_index_that_is_none(copy, text):
    directory = copy("sharded")
    (directory / INDEX_FILE).write_text(text)
    assert_names(failure(directory), directory / INDEX_FILE, "expected an ", ", found ")


def test_a_directory_without_or_with_two_checkpoints(copy):
    directory = copy("sharded")
    (directory / INDEX_FILE).rename(directory / "index")
    assert_names(failure(directory), directory, SINGLE_FILE, INDEX_FILE, "found neither, but model-00001")
    (directory / "index").rename(directory / INDEX_FILE)
    (directory / SINGLE_FILE).write_bytes(b"")
    assert_names(failure(directory), directory, SINGLE_FILE, INDEX_FILE, "found both")


def test_a_failed_open_leaves_no_file_open(copy):
    directory = copy()
    (directory / SINGLE_FILE).write_bytes(b"{}")
    for _ in range(20):
        failure(directory)  # an open file would warn when collected, and warnings are errors here


# --- summary and writing


def test_summary(originals):
    with Checkpoint.open(originals / "untied") as checkpoint:
        found = summary(checkpoint)
    total = found.total
    assert total.bytes == 2 * total.parameters == sum(part.bytes for part in found.parts.values())
    assert set(found.parts) == {"embedding", "head", "attention", "gate", "experts", "norms"}
    assert found.parts["embedding"].parameters == 32 * 16
    assert found.parts["norms"].tensors == 2 * 4 + 1
    assert found.experts.keys() == {0, 1, 2}
    assert found.experts[2].parameters == 2 * 3 * 8 * 16
    assert sum(size.bytes for size in found.experts.values()) == found.parts["experts"].bytes
    assert found.dtypes == {"BF16": total.parameters}
    assert found.files == {SINGLE_FILE: (originals / "untied" / SINGLE_FILE).stat().st_size}
    assert (found.tied, found.num_layers, found.config_hash) == (False, 2, UNTIED.content_hash)


def test_random_models_are_functions_of_the_seed(originals, tmp_path):
    random_checkpoint(tmp_path / "again", CONFIG, seed=1)
    random_checkpoint(tmp_path / "other", CONFIG, seed=2)
    assert (tmp_path / "again" / SINGLE_FILE).read_bytes() == (originals / "single" / SINGLE_FILE).read_bytes()
    one, other = read_all(tmp_path / "again"), read_all(tmp_path / "other")
    assert not any(torch.equal(one[name], other[name]) for name in one)
    untied = read_all(originals / "untied")
    assert all(torch.equal(untied[name], one[name]) for name in one)


def test_a_random_model_says_something(tmp_path):
    random_checkpoint(tmp_path, TINY, seed=0)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.config == TINY
        logits = reference_logits(checkpoint, list(range(40)))
    assert torch.isfinite(logits).all()
    assert 0.5 < float(logits.std()) < 10
    assert len(set(logits.argmax(-1).tolist())) > 15


def test_writing_shards(tmp_path, originals):
    tensors = read_all(originals / "single")
    write_checkpoint(tmp_path, CONFIG.to_dict(), tensors, SHARD_BYTES)
    assert same(read_all(tmp_path), tensors)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for path in tmp_path.glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= SHARD_BYTES


def test_writing_does_not_mix_two_checkpoints(originals, copy):
    with pytest.raises(CheckpointError, match="already holds"):
        random_checkpoint(copy(), CONFIG)
