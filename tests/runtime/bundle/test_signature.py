"""A bundle that must be signed by a key is opened if it is, and by no other."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

import runtime
from runtime.bundle.directory import open_bundle
from runtime.bundle.signature import FILE, is_small
from runtime.bundle.signing import make_key, sign, verify
from runtime.opened import default_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(default_bundle(), tmp_path / "bundle"))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_key(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def public(key: Path) -> Path:
    return key.with_name("key.pub")


def test_signed_and_opened(bundle: Path, key: Path, public: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    answer = sign(bundle, key)
    assert answer["digest"] == open_bundle(bundle, key=public).digest
    assert verify(bundle, public)["signed_by"] == verify(bundle)["signed_by"]
    assert verify(bundle)["signed_by"] == answer["fingerprint"]
    sign(bundle, key)  # again: the old signature is replaced
    assert runtime.load(bundle, key=public).bundle.name
    assert not list(bundle.glob(".*"))


def test_unsigned(bundle: Path, public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(bundle)["signed_by"] is None
    for open_it in (lambda: open_bundle(bundle, key=public), lambda: verify(bundle, public)):
        with pytest.raises(ValueError, match=r"is not signed \(it has no manifest\.sig\)"):
            open_it()
    monkeypatch.setenv("D2M_PUBLIC_KEY", str(public))
    with pytest.raises(ValueError, match="is not signed"):
        runtime.load(bundle)
    with pytest.raises(ValueError, match="is not signed"):
        runtime.load()


def test_signed_by_another(bundle: Path, key: Path, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    sign(bundle, key)
    with pytest.raises(ValueError, match="signed by key [0-9a-f]{32}, expected [0-9a-f]{32}"):
        open_bundle(bundle, key=tmp_path / "other.pub")


def test_a_manifest_that_was_changed(bundle: Path, key: Path, public: Path) -> None:
    sign(bundle, key)
    path = bundle / "manifest.json"
    path.write_text(path.read_text() + "\n")
    open_bundle(bundle)  # no key was asked for
    for wanted in (public, None):
        with pytest.raises(ValueError, match="is no signature of its manifest"):
            verify(bundle, wanted)


def test_a_file_that_was_changed_with_its_size_kept(bundle: Path, key: Path, public: Path) -> None:
    sign(bundle, key)
    path = bundle / "vae_decoder.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="has SHA-256"):
        open_bundle(bundle, key=public)
    with pytest.raises(ValueError, match="has SHA-256"):
        sign(bundle, key)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", "{}", '{"algorithm": "none"}', "\0", "[" * 60_000, "x" * 70_000,
        json.dumps({"algorithm": "ed25519", "key": "0" * 64, "signature": "0" * 128}),
        json.dumps({"algorithm": "ed25519", "key": "f" * 64, "signature": "f" * 128}),
        json.dumps({"algorithm": "ed25519", "key": ["0"], "signature": 1}),
        json.dumps({"algorithm": "ed25519", "key": "0" * 64 + "\n", "signature": "0" * 128}),
    ],
)  # fmt: skip
def test_a_signature_that_is_none(bundle: Path, public: Path, text: str) -> None:
    (bundle / FILE).write_text(text)
    for wanted in (public, None):
        with pytest.raises(
            ValueError, match=r"cannot be used: .*(manifest\.sig|signed by)"
        ) as info:
            verify(bundle, wanted)
        assert "\n" not in str(info.value)


SMALL = [
    "00" * 32, "00" * 31 + "80", "01" + "00" * 31, "ec" + "ff" * 30 + "7f", "ed" + "ff" * 30 + "7f",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
]  # fmt: skip


def test_keys_with_which_anyone_can_sign(bundle: Path, key: Path, public: Path) -> None:
    """All points of small order, some written in two ways; a true key is none of them."""
    for text in SMALL:
        assert is_small(bytes.fromhex(text)), text
        row = {"algorithm": "ed25519", "key": text, "signature": "0" * 128}
        (bundle / FILE).write_text(json.dumps(row))
        with pytest.raises(ValueError, match="names a key with which anyone can sign"):
            verify(bundle, None)
    sign(bundle, key)
    assert not is_small(bytes.fromhex(json.loads((bundle / FILE).read_text())["key"]))


def test_a_signature_beside_the_bundle(bundle: Path, key: Path, public: Path) -> None:
    sign(bundle, key)
    (bundle / FILE).rename(bundle.parent / "sig")
    (bundle / FILE).symlink_to(bundle.parent / "sig")
    with pytest.raises(ValueError, match=r"manifest\.sig is no signature|is no file of it"):
        open_bundle(bundle, key=public)


def test_keys_that_are_none(bundle: Path, key: Path, public: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="key exists"):
        make_key(key)
    (tmp_path / "text").write_text("key")
    for wrong in (tmp_path / "text", public):
        with pytest.raises(ValueError, match="is not a private key in PEM form.*d2m keygen"):
            sign(bundle, wrong)
    with pytest.raises(ValueError, match="is not a public key in PEM form"):
        open_bundle(bundle, key=key)
    with pytest.raises(FileNotFoundError, match="expected a public key"):
        open_bundle(bundle, key=tmp_path / "nowhere")


def test_a_key_of_another_kind(bundle: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    other = ec.generate_private_key(ec.SECP256R1())
    text = other.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    (tmp_path / "ec").write_bytes(text)
    with pytest.raises(ValueError, match="is not a private key of Ed25519"):
        sign(bundle, tmp_path / "ec")


def test_a_missing_package_names_the_extra(bundle: Path, public: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(ImportError, match=r"install with: pip install .*\[sign\]'"):
        open_bundle(bundle, key=public)
    open_bundle(bundle)


def test_openssl_agrees(bundle: Path, key: Path, public: Path, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl")
    sign(bundle, key)
    row = json.loads((bundle / FILE).read_text())
    (tmp_path / "sig").write_bytes(bytes.fromhex(row["signature"]))
    message = b"d2m bundle manifest, format 1\0" + (bundle / "manifest.json").read_bytes()
    (tmp_path / "message").write_bytes(message)
    command = [openssl, "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin"]
    command += ["-in", str(tmp_path / "message"), "-sigfile", str(tmp_path / "sig")]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_the_command_line(bundle: Path, tmp_path: Path, capsys) -> None:
    from d2m.cli import main

    key = tmp_path / "own"
    assert main(["verify", str(bundle), "--key", str(key)]) == 2
    assert main(["keygen", str(key)]) == 0
    assert main(["sign", str(bundle), "--key", str(key)]) == 0
    capsys.readouterr()
    assert main(["verify", str(bundle), "--key", f"{key}.pub", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["key_asked_for"] and len(answer["signed_by"]) == 32
    assert main(["verify", str(bundle), "--json"]) == 0
    assert main(["run", str(bundle), "x", "--key", str(key)]) == 2  # the private one
    assert main(["run", str(bundle), "x", "--verify", "none"]) == 2
    assert "expected one of cached, full" in capsys.readouterr().err
