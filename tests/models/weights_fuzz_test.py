"""Damaged and hostile files: a clear error, and never another model than was stored."""

import contextlib
import io
import itertools
import json
import pickle
import struct
import tracemalloc
import warnings
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save, save_file

from snnk_jax.models import bert, vit
from snnk_jax.models.bert import BertConfig
from snnk_jax.models.bert_params import load_bert
from snnk_jax.models.vit import ViT
from snnk_jax.models.vit_import import import_vit
from tests.models.bert_params_test import CONFIG, make_tensors
from tests.models.vit_import_test import CONFIG as VIT_CONFIG
from tests.models.vit_import_test import (
    POSITION,
    make_hugging_face,
    make_npz,
    write_hugging_face,
)

# One block and no head: most of the time of a load is to trace the model's shapes.
STORED = CONFIG | {"num_hidden_layers": 1}
SIZES = BertConfig(
    hidden_size=8,
    depth=1,
    num_heads=2,
    mlp_dim=12,
    vocab_size=11,
    max_length=7,
    head="none",
)
QUERY = "encoder.layer.0.attention.self.query.weight"
DENSE = "Transformer/encoderblock_0/MlpBlock_3/Dense"


@pytest.fixture
def tensors():
    return make_tensors(STORED)


@pytest.fixture
def arrays():
    return make_npz(depth=1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def npz(tmp_path):
    return tmp_path / "vit.npz"


def load(path):
    return load_bert(path, config=SIZES)[0]


def write_index(folder, places, **files):
    folder.mkdir(exist_ok=True)
    text = places if isinstance(places, str) else json.dumps({"weight_map": places})
    path = folder / "model.safetensors.index.json"
    path.write_text(text, "utf-8")
    for name, part in files.items():
        save_file(part, folder / f"{name}.safetensors")
    return path


def npy(array, shape=None, version=(1, 0), descr=None):
    """An ``.npy`` file, which may claim another shape or dtype than it holds."""
    file = io.BytesIO()
    header = {
        "descr": descr or array.dtype.str,
        "fortran_order": False,
        "shape": array.shape if shape is None else shape,
    }
    write_header = getattr(
        np.lib.format, f"write_array_header_{version[0]}_{version[1]}"
    )
    write_header(file, header)
    return file.getvalue() + array.tobytes()


def write_members(path, members, compression=zipfile.ZIP_STORED):
    """Writes the members of a zip archive as they are given, with right checksums."""
    pairs = members.items() if isinstance(members, dict) else members
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate name")
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in pairs:
                archive.writestr(f"{name}.npy", data)
    return path


def write_claims(path, arrays, claims):
    """Writes an ``.npz`` file whose headers claim other shapes."""
    return write_members(
        path, {name: npy(value, claims.get(name)) for name, value in arrays.items()}
    )


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def check_mutants(load, path, mutants, original):
    """Each mutant must be refused with a clear error or be read as the original."""
    expected, escaped = leaves(original), set()
    refused = 0
    for mutant in mutants:
        path.write_bytes(mutant)
        try:
            model = load(path)
        except (ValueError, FileNotFoundError):
            refused += 1
        except Exception as error:
            escaped.add(f"{type(error).__name__}: {error}")
        else:
            for found, right in zip(leaves(model), expected, strict=True):
                np.testing.assert_array_equal(found, right)
    assert not escaped
    return refused


def flipped(data, low, high, count, seed):
    """Copies of the data with one bit of a byte in the range flipped."""
    rng = np.random.default_rng(seed)
    for place, bit in zip(
        rng.integers(low, high, count), rng.integers(8, size=count), strict=True
    ):
        mutant = bytearray(data)
        mutant[place] ^= 1 << int(bit)
        yield bytes(mutant)


@contextlib.contextmanager
def bounded(megabytes=50):
    """Fails if Python and NumPy hold more memory than that at any time."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert peak < megabytes


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def assert_harmless(path):
    """The pickles here do go off when they are loaded, and this one did not."""
    assert not path.exists()
    pickle.loads(pickle.dumps(Bomb(path))).close()
    assert path.exists()


# safetensors


def test_a_truncated_safetensors_file(path, tensors):
    data = save(tensors)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    ends = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) - 1}
    for end in sorted(ends | set(range(0, len(data), 97))):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="must be a whole safetensors file. Got"):
            load(path)


def test_bytes_after_the_last_tensor(path, tensors):
    path.write_bytes(save(tensors) + b"\0")
    with pytest.raises(ValueError, match="must be a whole safetensors file. Got"):
        load(path)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_in_a_safetensors_header(path, tensors, seed):
    data = save(tensors, {"format": "pt"})
    header = 8 + struct.unpack("<Q", data[:8])[0]
    path.write_bytes(data)
    original = load(path)
    mutants = flipped(data, 0, header, 50, seed)
    assert check_mutants(load, path, mutants, original) > 25


@pytest.mark.parametrize("size", [0, 1, 10 * 2**30, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_that_claims_another_size(path, tensors, size):
    path.write_bytes(struct.pack("<Q", size) + save(tensors)[8:])
    with bounded(), pytest.raises(ValueError, match="must be a whole safetensors file"):
        load(path)


def info(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"x": info([2**62, 8], 0, 32)},
        {"x": info([2**63 - 1], 0, 32)},
        {"x": info([2**64], 0, 32)},
        {"x": info([10**30], 0, 32)},
        {"x": info([8], 0, 2**62)},
        {"x": info([-8], 0, 32)},
        {"x": info([8], 32, 0)},
        {"x": info([4], 16, 32)},
        {"x": info([8], 0, 32), "y": info([8], 0, 32)},
        {"x": info([6], 0, 24), "y": info([4], 16, 32)},
        {"x": info([2], 0, 8), "y": info([4], 16, 32)},
        {"x": info([8], 0, 32, "F128")},
        {"x": info("8", 0, 32)},
        {"x": {"dtype": "F32", "shape": [8]}},
        {"x": 3},
        {"__metadata__": {"format": 3}, "x": info([8], 0, 32)},
        [],
        "header",
        None,
    ],
)
def test_a_safetensors_header_that_lies(path, header):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(32))
    with bounded(), pytest.raises(ValueError, match="must be a whole safetensors file"):
        load(path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b'{"x": \xff}', b'{"x":' * 10_000, b"[" * 100_000]
)
def test_a_safetensors_header_that_is_no_json(path, text):
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load(path)


@pytest.mark.parametrize("dtype", ["int64", "int32", "int8", "uint8", "bool"])
def test_weights_that_are_no_floats(path, tensors, dtype):
    tensors[QUERY] = tensors[QUERY].astype(dtype)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"no floats \['{QUERY} [IUB]"):
        load(path)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("float64", np.nan),
        ("float32", np.nan),
        ("float32", np.inf),
        ("float16", -np.inf),
        (ml_dtypes.bfloat16, np.inf),
    ],
)
def test_weights_that_are_not_finite(path, tensors, dtype, value):
    tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    names = [QUERY, "pooler.dense.bias"]
    for name in names:
        tensors[name].flat[1] = value
    save_file(tensors, path)
    with pytest.raises(ValueError, match="must be finite") as error:
        load(path)
    assert all(repr(name) in str(error.value) for name in names)


def test_what_is_not_read_need_not_be_finite(path, tensors):
    tensors["cls.predictions.bias"] = np.full(11, np.nan, np.float32)
    save_file(tensors, path)
    assert all(np.isfinite(leaf).all() for leaf in leaves(load(path)))


@pytest.mark.parametrize(
    ("dtype", "param_dtype"), [("float64", "float32"), ("float32", "float16")]
)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_weights_too_large_for_the_parameters(path, tensors, dtype, param_dtype):
    tensors[QUERY] = np.full((8, 8), np.finfo(dtype).max, dtype)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"finite.*{QUERY}"):
        load_bert(path, config=SIZES, param_dtype=jnp.dtype(param_dtype))


@pytest.mark.parametrize(
    "twice",
    ["bert.pooler.dense.bias", "embeddings.LayerNorm.gamma"],
)
def test_names_that_are_the_same_once_cleaned(path, tensors, twice):
    save_file(tensors | {twice: np.ones(8, np.float32)}, path)
    with pytest.raises(ValueError, match="must name each tensor once. Got '.*' and"):
        load(path)


def test_all_that_is_wrong_is_in_one_message(path, tensors):
    del tensors["embeddings.LayerNorm.bias"], tensors["pooler.dense.weight"]
    tensors["encoder.layer.1.output.dense.bias"] = np.ones(8, np.float32)
    tensors["surplus"] = np.ones(2, np.float32)
    tensors[QUERY] = np.ones((8, 9), np.float32)
    tensors["pooler.dense.bias"] = np.ones((), np.float32)
    tensors["encoder.layer.0.output.dense.bias"] = np.ones(8, np.int64)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="exactly the parameters") as error:
        load(path)
    message = str(error.value)
    assert "missing ['embeddings.LayerNorm.bias', 'pooler.dense.weight']" in message
    unexpected = "['encoder.layer.1.output.dense.bias', 'surplus']"
    assert f"unexpected {unexpected}" in message
    assert f"{QUERY} (8, 9) instead of (8, 8)" in message
    assert "pooler.dense.bias () instead of (8,)" in message
    assert "no floats ['encoder.layer.0.output.dense.bias I64']" in message
    assert str(path) in message


def test_all_that_is_wrong_with_an_npz_is_in_one_message(npz, arrays):
    del arrays["Transformer/encoder_norm/bias"]
    arrays["surplus"] = np.ones(2, np.float32)
    arrays[f"{DENSE}_0/bias"] = np.ones(13, np.float32)
    arrays["embedding/bias"] = np.ones(8, np.int32)
    np.savez(npz, **arrays)
    with pytest.raises(ValueError, match="exactly the parameters") as error:
        import_vit(npz)
    message = str(error.value)
    assert "missing ['Transformer/encoder_norm/bias']" in message
    assert "unexpected ['surplus']" in message
    assert f"misshapen ['{DENSE}_0/bias (13,) instead of (12,)']" in message
    assert "no floats ['embedding/bias int32']" in message
    assert str(npz) in message


# An index of several files


@pytest.mark.parametrize(
    "file",
    [
        "../evil.safetensors",
        "ABSOLUTE",
        "a/evil.safetensors",
        "./evil.safetensors",
        "..\\evil.safetensors",
        "evil.safetensors\n",
        "evil.safetensors\0",
        "evil.bin",
        "evil.npz",
        "..",
        "",
        ".safetensors/",
        None,
        3,
        ["evil.safetensors"],
        {"evil.safetensors": 1},
    ],
)
def test_an_index_names_plain_files_of_its_folder_alone(tmp_path, tensors, file):
    # Every file that a careless loader would open is there and would load.
    folder = tmp_path / "model"
    for target in (tmp_path, folder, folder / "a"):
        target.mkdir(exist_ok=True)
        save_file(tensors, target / "evil.safetensors")
    if file == "ABSOLUTE":
        file = str(tmp_path / "evil.safetensors")
    write_index(folder, dict.fromkeys(tensors, "evil.safetensors"))
    load(folder)
    # One bad place among good ones is enough.
    write_index(folder, dict.fromkeys(tensors, "evil.safetensors") | {QUERY: file})
    with pytest.raises(ValueError, match="of its own folder. Got .* for 'encoder.lay"):
        load(folder)


def test_an_index_with_a_name_too_long_for_a_file(tmp_path, tensors):
    write_index(tmp_path, dict.fromkeys(tensors, f"{'a' * 300}.safetensors"))
    with pytest.raises((ValueError, FileNotFoundError), match="must"):
        load(tmp_path)


def test_an_index_that_names_an_absent_file(tmp_path, tensors):
    places = dict.fromkeys(tensors, "one.safetensors") | {QUERY: "two.safetensors"}
    rest = {name: value for name, value in tensors.items() if name != QUERY}
    write_index(tmp_path, places, one=rest)
    with pytest.raises(FileNotFoundError, match="Got .*two.safetensors"):
        load(tmp_path)
    (tmp_path / "two.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match="Got .*two.safetensors"):
        load(tmp_path)


def test_an_index_that_lists_other_tensors_than_the_file(tmp_path, tensors):
    places = dict.fromkeys(tensors, "one.safetensors") | {"x": "one.safetensors"}
    del places[QUERY]
    write_index(tmp_path, places, one=tensors)
    message = rf"one.safetensors must .*missing \['x'\], unlisted \['{QUERY}'\]"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_tensor_in_another_file_than_the_index_says(tmp_path, tensors):
    halves = [
        dict(itertools.islice(tensors.items(), start, None, 2)) for start in (0, 1)
    ]
    places = dict.fromkeys(halves[0], "two.safetensors")
    places |= dict.fromkeys(halves[1], "one.safetensors")
    write_index(tmp_path, places, one=halves[0], two=halves[1])
    with pytest.raises(ValueError, match="must hold the tensors that the index lists"):
        load(tmp_path)


def test_a_truncated_file_of_an_index(tmp_path, tensors):
    places = dict.fromkeys(tensors, "one.safetensors")
    write_index(tmp_path, places, one=tensors)
    file = tmp_path / "one.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="whole safetensors file. Got .*one.safetens"):
        load(tmp_path)


@pytest.mark.parametrize("places", [[], {}, None, "one.safetensors", 3, ["x"]])
def test_a_weight_map_that_is_none(tmp_path, places):
    write_index(tmp_path, places if isinstance(places, dict) else {})
    write_index(tmp_path, json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match="must hold a weight_map. Got"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[{}]",
        "null",
        '"weight_map"',
        "[" * 100_000,
        '{"weight_map":' * 100_000,
        # More digits than Python turns into an int.
        '{"weight_map": ' + "1" * 5000 + "}",
    ],
    ids=lambda text: text[:20],
)
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_json_that_is_no_object(tmp_path, tensors, name, text):
    if name == "config.json":
        save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"must .*Got .*{name}"):
        load_bert(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_json_that_is_too_large_is_not_read(tmp_path, tensors, name):
    if name == "config.json":
        save_file(tensors, tmp_path / "model.safetensors")
    with open(tmp_path / name, "wb") as file:
        file.truncate(2**31)
    with (
        bounded(),
        pytest.raises(ValueError, match="must be at most .* Got 2147"),
    ):
        load_bert(tmp_path)


def test_an_index_without_a_folder_that_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="index of the weights must be an exis"):
        load(tmp_path / "model.safetensors.index.json")


# Sizes in a config.json


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 10**30},
        # A zero head of this many rows alone is larger than any memory.
        {"hidden_size": 10**13},
        {"intermediate_size": 10**30},
        {"vocab_size": 10**19},
    ],
    ids=str,
)
def test_a_config_of_impossible_sizes(tmp_path, tensors, sizes):
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(STORED | sizes))
    with bounded(), pytest.raises(ValueError, match="must .*Got"):
        load_bert(tmp_path)


@pytest.fixture
def few_blocks(monkeypatch):
    """Fails when many blocks are built, which takes time as the square of them."""
    built = itertools.count(1)
    for module in (bert, vit):

        def build(*args, original=module.Block, **options):
            assert next(built) <= 10, "built before the names were checked"
            return original(*args, **options)

        monkeypatch.setattr(module, "Block", build)


# A file may ask for any number of blocks: the bound is less than what the names of so
# many take, and more than what an error needs.
@pytest.mark.usefixtures("few_blocks")
def test_a_config_of_too_many_blocks(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    config = STORED | {"num_hidden_layers": 2000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with bounded(5), pytest.raises(ValueError, match="must .*Got"):
        load_bert(tmp_path)


@pytest.mark.usefixtures("few_blocks")
def test_a_vit_config_of_too_many_blocks(tmp_path):
    config = VIT_CONFIG | {"num_hidden_layers": 2000}
    write_hugging_face(tmp_path, make_hugging_face(), config)
    with bounded(5), pytest.raises(ValueError, match="must .*Got"):
        import_vit(tmp_path)


# Pickles


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl", "ckpt", "msgpack"])
@pytest.mark.parametrize("read", [load, import_vit, ViT.from_pretrained])
def test_pickles_are_refused_by_their_names_unopened(tmp_path, read, suffix):
    path, mark = tmp_path / f"pytorch_model.{suffix}", tmp_path / "mark"
    with pytest.raises(ValueError, match="pickles run code. Got .*convert it with saf"):
        read(path)
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match="pickles run code. Got .*convert it with saf"):
        read(path)
    assert_harmless(mark)


@pytest.mark.parametrize("name", ["x.safetensors", "x.npz", "x.npy", "x", "x.BIN"])
@pytest.mark.parametrize("read", [load, import_vit, ViT.from_pretrained])
def test_pickles_by_another_name_are_refused(tmp_path, read, name):
    path, mark = tmp_path / name, tmp_path / "mark"
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match="weights must be a whole"):
        read(path)
    assert_harmless(mark)


@pytest.mark.parametrize("name", ["cls", "head/bias", "surplus", "opt/state"])
def test_an_object_array_is_not_unpickled(tmp_path, npz, arrays, name):
    mark = tmp_path / "mark"
    bomb = np.array([Bomb(mark)], object)
    np.savez(npz, **arrays | {name: bomb})
    if name == "opt/state":
        assert import_vit(npz)[1].ignored == (name,)
    else:
        with pytest.raises(ValueError, match=f"weights must .*{name}"):
            import_vit(npz)
    assert_harmless(mark)


def test_an_object_array_of_the_right_shape_is_not_unpickled(tmp_path, npz, arrays):
    mark = tmp_path / "mark"
    arrays["cls"] = np.full((1, 1, 8), Bomb(mark), object)
    np.savez(npz, **arrays)
    with pytest.raises(ValueError, match="no floats .'cls object'."):
        import_vit(npz)
    assert_harmless(mark)


# npz


@pytest.mark.parametrize("save_npz", [np.savez, np.savez_compressed])
def test_a_truncated_npz(npz, arrays, save_npz):
    save_npz(npz, **arrays)
    data = npz.read_bytes()
    for end in sorted({0, 1, 3, 4, len(data) - 1} | set(range(0, len(data), 97))):
        npz.write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"weights must be a whole .npz .*vit.npz"):
            import_vit(npz)


@pytest.mark.parametrize("part", ["members", "directory"])
@pytest.mark.parametrize("save_npz", [np.savez, np.savez_compressed])
def test_flipped_bits_in_an_npz(npz, arrays, save_npz, part):
    save_npz(npz, **arrays)
    data = npz.read_bytes()
    directory = data.index(b"PK\x01\x02")
    ranges = {"members": (0, directory), "directory": (directory, len(data))}
    original = import_vit(npz)[0]
    mutants = flipped(data, *ranges[part], 40, seed=0)
    refused = check_mutants(lambda path: import_vit(path)[0], npz, mutants, original)
    assert refused > 10


# Places of fields in a member's entry of the directory, after the format's definition.
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (6, struct.pack("<H", 99)),
        (8, struct.pack("<H", 1)),
        (8, struct.pack("<H", 1 << 5)),
        (8, struct.pack("<H", 1 << 6)),
        (10, struct.pack("<H", 99)),
        (10, struct.pack("<H", zipfile.ZIP_DEFLATED)),
        (10, struct.pack("<H", zipfile.ZIP_BZIP2)),
        (10, struct.pack("<H", zipfile.ZIP_LZMA)),
        (16, bytes(4)),
        (24, struct.pack("<I", 0)),
        (42, struct.pack("<I", 2**31)),
    ],
    ids=[
        "version",
        "encrypted",
        "patched",
        "strongly encrypted",
        "unknown compression",
        "deflate",
        "bzip2",
        "lzma",
        "checksum",
        "size",
        "offset",
    ],
)
def test_a_directory_that_lies(npz, arrays, place, value):
    np.savez(npz, **arrays)
    data = bytearray(npz.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + place : entry + place + len(value)] = value
    npz.write_bytes(data)
    with pytest.raises(ValueError, match="weights must be"):
        import_vit(npz)


def test_a_damaged_stream_in_an_npz(npz, arrays):
    np.savez_compressed(npz, **arrays)
    data = bytearray(npz.read_bytes())
    # The first bytes of the first member's stream.
    start = 30 + sum(struct.unpack("<HH", data[26:30]))
    for value in (0x00, 0xFF, 0x07):
        data[start] = value
        npz.write_bytes(data)
        with pytest.raises(ValueError, match=r"weights must be"):
            import_vit(npz)


def mutated_headers(arrays, count, seed):
    """Archives in which one character of one header is another."""
    rng = np.random.default_rng(seed)
    members = {name: npy(value) for name, value in arrays.items()}
    # Without ">": that is the valid header of other numbers.
    characters = b"(){}[]'\",:L0123456789<|OVf \n\\#-x\0\xff"
    for _ in range(count):
        name = rng.choice(list(members))
        member = bytearray(members[name])
        length = member.index(b"}") + 2
        member[rng.integers(length)] = rng.choice(list(characters))
        file = io.BytesIO()
        write_members(file, members | {name: bytes(member)})
        yield file.getvalue()


# NumPy warns when it reads what Python 2 may have written.
@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")
@pytest.mark.parametrize("seed", range(2))
def test_mutated_headers_in_an_npz(npz, arrays, seed):
    np.savez(npz, **arrays)
    original = import_vit(npz)[0]
    mutants = mutated_headers(arrays, 60, seed)
    refused = check_mutants(lambda path: import_vit(path)[0], npz, mutants, original)
    assert refused > 30


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 8), ",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 8)",
        "{'descr': '<f4', 'fortran_order': False}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 8}",
        "{'descr': '<f4', 'fortran_order': 1, 'shape': (1, 1, 8)}",
        "{'descr': 'float', 'fortran_order': False, 'shape': (True, True, 8)}",
        "{'descr': '<f5', 'fortran_order': False, 'shape': (1, 1, 8)}",
        "{'descr': ',f4', 'fortran_order': False, 'shape': (1, 1, 8)}",
        "{'descr': ['<f4'], 'fortran_order': False, 'shape': (1, 1, 8)}",
        "{'descr': ('<f4', -1), 'fortran_order': False, 'shape': (1, 1, 8)}",
        "{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (1, 1, 8)}",
        "{'descr': '|S1000000000', 'fortran_order': False, 'shape': (1, 1, 8)}",
        "__import__('os')",
        "[]",
        "(" * 5000,
        "-" * 9000 + "1",
        "{0: " * 300 + "}" * 300,
        "  x\n y",
        "9" * 5000,
    ],
    ids=lambda text: repr(text[:60]),
)
def test_an_npy_header_that_is_none(npz, arrays, text):
    members = {name: npy(value) for name, value in arrays.items()}
    header = text.encode() + b"\n"
    members["cls"] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    members["cls"] += arrays["cls"].tobytes()
    write_members(npz, members)
    with pytest.raises(ValueError, match="weights must"):
        import_vit(npz)


@pytest.mark.parametrize("version", [(1, 1), (4, 0), (255, 255)])
def test_an_npy_of_an_unknown_version(npz, arrays, version):
    members = {name: npy(value) for name, value in arrays.items()}
    members["cls"] = b"\x93NUMPY" + bytes(version) + members["cls"][8:]
    write_members(npz, members)
    with pytest.raises(ValueError, match="cls.npy is of the unknown version"):
        import_vit(npz)


@pytest.mark.parametrize("member", [b"", b"\x93NUMPY", b"PK", b"\x93NUMPY\x01\x00\xff"])
def test_a_member_that_is_no_array(npz, arrays, member):
    members = {name: npy(value) for name, value in arrays.items()}
    write_members(npz, members | {"cls": member})
    with pytest.raises(ValueError, match=r"weights must be a whole .npz"):
        import_vit(npz)


@pytest.mark.parametrize(
    "claims",
    [
        {"cls": (1, 1, 10**12)},
        {"cls": (1, 1, 10**30)},
        {"cls": (1, 1, -8)},
        {"head/kernel": (8, 2**62)},
        {"head/bias": (10**12,)},
        {f"{DENSE}_0/kernel": (8, 10**12)},
        {"embedding/kernel": (2, 2, 3, 10**12)},
        {"embedding/kernel": (2, 2, 3, -8)},
        {"embedding/kernel": (0, 0, 3, 8)},
        {POSITION: (1, 10**30, 8)},
        {POSITION: (1, -9, 8)},
    ],
    ids=str,
)
def test_a_shape_at_odds_with_the_others_is_refused_unread(npz, arrays, claims):
    write_claims(npz, arrays, claims)
    with bounded(), pytest.raises(ValueError, match="must .*Got"):
        import_vit(npz)


# The sizes of an .npz file are read off its shapes: these agree with one another.
@pytest.mark.parametrize("size", [10**4, 10**5, 10**9])
def test_a_huge_patch_is_not_allocated(npz, arrays, size):
    write_claims(npz, arrays, {"embedding/kernel": (size, size, 3, 8)})
    with bounded(), pytest.raises(ValueError, match="must"):
        import_vit(npz)


@pytest.mark.parametrize("size", [10**8, 10**12, 10**19, 10**30])
def test_a_huge_hidden_layer_is_not_allocated(npz, arrays, size):
    claims = {
        f"{DENSE}_0/kernel": (8, size),
        f"{DENSE}_0/bias": (size,),
        f"{DENSE}_1/kernel": (size, 8),
    }
    write_claims(npz, arrays, claims)
    with bounded(), pytest.raises(ValueError, match="must"):
        import_vit(npz)


def test_a_huge_head_is_not_allocated(npz, arrays):
    write_claims(npz, arrays, {"head/kernel": (8, 10**8), "head/bias": (10**8,)})
    with bounded(), pytest.raises(ValueError, match="must"):
        import_vit(npz)


@pytest.mark.parametrize("short", [1, 4, 16])
def test_an_array_that_ends_early(npz, arrays, short):
    members = {name: npy(value) for name, value in arrays.items()}
    members["cls"] = members["cls"][:-short]
    write_members(npz, members)
    with pytest.raises(ValueError, match="whole .npz file .* cls.npy must hold"):
        import_vit(npz)


def test_no_more_is_unpacked_than_the_header_declares(npz, arrays):
    np.savez(npz, **arrays)
    original = import_vit(npz)[0]
    members = {name: npy(value) for name, value in arrays.items()}
    members["cls"] += bytes(2**27)
    write_members(npz, members, zipfile.ZIP_DEFLATED)
    assert npz.stat().st_size < 2**18
    with bounded():
        try:
            model = import_vit(npz)[0]
        except ValueError:
            return
    for found, right in zip(leaves(model), leaves(original), strict=True):
        np.testing.assert_array_equal(found, right)


def test_a_huge_header_is_not_unpacked(npz, arrays):
    members = {name: npy(value) for name, value in arrays.items()}
    size = 2**26
    members["cls"] = b"\x93NUMPY\x02\x00" + struct.pack("<I", size) + b" " * size
    write_members(npz, members, zipfile.ZIP_DEFLATED)
    del members
    assert npz.stat().st_size < 2**18
    with bounded(), pytest.raises(ValueError, match="must"):
        import_vit(npz)


def test_a_member_twice(npz, arrays):
    members = [(name, npy(value)) for name, value in arrays.items()]
    write_members(npz, [*members, ("cls", npy(np.ones((1, 1, 8), np.float32)))])
    with pytest.raises(ValueError, match="must name each tensor once|whole .npz"):
        import_vit(npz)


@pytest.mark.parametrize("twice", ["params/cls", "opt/target/cls", "img/cls"])
def test_npz_names_that_are_the_same_once_cleaned(npz, arrays, twice):
    np.savez(npz, **arrays | {twice: arrays["cls"]})
    with pytest.raises(ValueError, match="must name each tensor once. Got '.*cls' and"):
        import_vit(npz)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_npz_weights_that_are_not_finite(npz, arrays, value):
    arrays["cls"][0, 0, 3] = value
    np.savez(npz, **arrays)
    with pytest.raises(
        ValueError, match=r"must be finite in float32. Got .*\['cls'\] of .*vit.n"
    ):
        import_vit(npz)


@pytest.mark.parametrize("dtype", ["int64", "complex64", "bool", "U4", "M8[s]", "V4"])
def test_npz_weights_that_are_no_floats(npz, arrays, dtype):
    members = {name: npy(value) for name, value in arrays.items()}
    members["cls"] = npy(np.zeros((1, 1, 8), dtype))
    write_members(npz, members)
    with pytest.raises(ValueError, match=r"no floats \['cls "):
        import_vit(npz)


def test_a_small_npz_that_unpacks_to_much_is_refused(tmp_path, npz):
    zeros = {f"extra/{i}": np.zeros(2**22, np.float32) for i in range(6)}
    np.savez_compressed(npz, **zeros)
    assert npz.stat().st_size < 2**17
    with pytest.raises(ValueError, match=r"must not unpack to 1\d{8}"):
        import_vit(npz)
