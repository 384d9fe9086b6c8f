from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest

from mega_tvm.weights import load_checkpoint, save_checkpoint
from tests.weights.builders import CONFIG, npy_header, npz_file, small_params, zip_file

PARAMS = small_params()


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "deflated"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", ">f8"])
def test_dtypes(dtype, compressed, load_bytes, same_bits):
    stored = {name: array.astype(dtype) for name, array in PARAMS.items()}
    checkpoint = load_bytes(npz_file(stored, compressed=compressed), ".npz")
    same_bits(checkpoint.params, {n: a.astype(np.float32) for n, a in stored.items()})


def test_fortran_order(load_bytes, same_bits):
    stored = {name: np.asfortranarray(array) for name, array in PARAMS.items()}
    same_bits(load_bytes(npz_file(stored), ".npz").params, PARAMS)


def test_test_data_beside_the_weights_is_passed_over(load_bytes, same_bits):
    others = {
        "__input__": np.zeros((2, 5, 3)),
        "__output__": np.zeros((2, 4)),
        "__state__/mega_block_1_ema_drop/key": np.zeros(2, np.uint32),
        "mega_block_1_attn_drop/key": np.zeros(2, np.uint32),
    }
    same_bits(load_bytes(npz_file(PARAMS | others), ".npz").params, PARAMS)


def test_own_files_hold_no_pickle(tmp_path):
    path = tmp_path / "model.npz"
    save_checkpoint(path, CONFIG, PARAMS)
    with np.load(path, allow_pickle=False) as file:
        assert json.loads(str(file["__config__"])) == CONFIG.to_dict()
    assert load_checkpoint(path).option_sources["dropout"] == "__config__"


def test_pickled_objects_are_refused_and_not_run(refuses, tmp_path):
    ran = tmp_path / "ran"

    class Malicious:
        def __reduce__(self):
            return ran.touch, ()

    array = np.empty(1, dtype=object)
    array[0] = Malicious()
    refuses(npz_file(PARAMS | {"final_norm/gamma": array}), ".npz", "final_norm/gamma")
    assert not ran.exists()


def replaced(content):
    """Return an archive of all arrays, but final_norm/gamma's member is this content."""
    name = "final_norm/gamma.npy"
    with zipfile.ZipFile(io.BytesIO(npz_file(PARAMS))) as archive:
        members = [(m, archive.read(m)) for m in archive.namelist() if m != name]
    return zip_file([*members, (name, content)])


BENT_MEMBERS = {
    "empty": (b"", ["header"]),
    "no-magic": (b"hello, world", ["header"]),
    "version-3": (b"\x93NUMPY\x03\x00" + npy_header((4,))[8:] + bytes(16), ["version"]),
    "deep-header": (b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000, ["header"]),
    "code-in-header": (b"\x93NUMPY\x01\x00\x0e\x00__import__(0)\n", ["header"]),
    "truncated": (npy_header((4,)) + bytes(15), ["15 bytes", "16"]),
    "too-long": (npy_header((4,)) + bytes(17), ["17 bytes", "16"]),
    "giant-shape": (npy_header((2**40, 2**20)), ["takes"]),
    "negative-dims": (npy_header((-2, -2)) + bytes(16), ["shape"]),
    "misshapen": (npy_header((5,)) + bytes(20), ["misshapen", "[5]", "[4]"]),
    "integers": (npy_header((4,), "<i4") + bytes(16), ["int32", "float32"]),
    "complex": (npy_header((4,), "<c8") + bytes(32), ["complex64"]),
    "record": (npy_header((4,), [("a", "<f4")]) + bytes(16), ["final_norm/gamma"]),
}


@pytest.mark.parametrize("case", BENT_MEMBERS)
def test_bent_member_is_refused_by_name(case, refuses):
    content, words = BENT_MEMBERS[case]
    refuses(replaced(content), ".npz", "final_norm/gamma", *words)


def patched_directory(content, name, offset, value):
    """Change a little-endian field of a member's entry in the central directory."""
    entry = content.rindex(name.encode()) - 46
    assert content[entry : entry + 4] == b"PK\x01\x02"
    return content[: entry + offset] + value + content[entry + offset + len(value) :]


GOOD = npz_file(PARAMS)
LAST = "final_norm/beta.npy"
FILE_SIZE, COMPRESSED_SIZE, METHOD, FLAGS, CHECKSUM = 24, 20, 10, 8, 16
OPTIONS = json.dumps({"ema_dim": 3})
MALFORMED = {
    "not-zip": (b"hello, world", ["zip"]),
    "only-magic": (b"PK\x03\x04", ["zip"]),
    "truncated": (GOOD[:-30], ["zip"]),
    "member-not-an-array": (zip_file([("readme.txt", b"hello")]), ["readme.txt"]),
    "no-members": (zip_file([]), []),
    "unknown-method": (patched_directory(GOOD, LAST, METHOD, b"\x0c\x00"), ["deflate"]),
    "encrypted": (patched_directory(GOOD, LAST, FLAGS, b"\x01\x00"), ["encrypted"]),
    "bad-checksum": (patched_directory(GOOD, LAST, CHECKSUM, b"\x00" * 4), ["final_norm/beta"]),
    "giant-member": (patched_directory(GOOD, LAST, FILE_SIZE, b"\xff\xff\xff\x7f"), ["plausibly"]),
    "giant-compressed": (
        patched_directory(GOOD, LAST, COMPRESSED_SIZE, b"\xff\xff\xff\x7f"),
        ["compressed bytes"],
    ),
    "config-contradiction": (npz_file(PARAMS | {"__config__": np.array(OPTIONS)}), ["ema_dim"]),
    "config-not-text": (npz_file(PARAMS | {"__config__": np.zeros(3)}), ["__config__"]),
    "config-not-json": (npz_file(PARAMS | {"__config__": np.array("{")}), ["__config__"]),
    "config-giant": (npz_file(PARAMS | {"__config__": np.array("x" * 10**6)}), ["__config__"]),
    "config-not-unicode": (
        npz_file(PARAMS | {"__config__": np.full((), 0xFFFFFFFF, "<u4").view("<U1")}),
        ["__config__"],
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_archive_is_refused(case, refuses):
    content, words = MALFORMED[case]
    refuses(content, ".npz", *words)


def test_duplicate_member_is_refused(refuses):
    file = io.BytesIO(GOOD)
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(LAST, npy_header((4,)) + bytes(16))
    refuses(file.getvalue(), ".npz", LAST, "twice")


def test_bomb_is_refused_by_its_directory(refuses):
    members = [("final_norm/gamma.npy", npy_header((1 << 25,)) + bytes(1 << 27))]
    refuses(zip_file(members, zipfile.ZIP_DEFLATED), ".npz", "plausibly")


def test_overlapping_members_are_refused(refuses):
    """Many members of the directory that share one member's bytes."""
    name = "a000.npy"
    content = zip_file([(name, npy_header((1000,)) + bytes(4000))])
    start = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    entry = content[start:end]
    directory = b"".join(entry.replace(b"a000", b"a%03d" % i) for i in range(100))
    tail = content[end : end + 8] + (100).to_bytes(2, "little") * 2
    tail += len(directory).to_bytes(4, "little") + start.to_bytes(4, "little") + b"\0\0"
    refuses(content[:start] + directory + tail, ".npz", "compressed bytes")
