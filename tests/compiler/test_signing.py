"""Signatures, against RFC 8032 written out in plain integers; and that nothing of a bundle is used before they hold."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from reelstep import __main__ as cli
from reelstep.compiler import bundle as bundle_module
from reelstep.compiler.bundle import Bundle, sign_bundle
from reelstep.compiler.describe import describe, describe_json
from reelstep.compiler.plan import canonical_json
from reelstep.compiler.signing import PREFIX, PrivateKey, PublicKey, make_keys, read_private_key, read_public_key
from reelstep.errors import BundleError, ConfigError, StorageError

P, ORDER = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int]


def add(a: Point, b: Point) -> Point:
    """On the twisted Edwards curve -x^2 + y^2 = 1 + d x^2 y^2."""
    (x1, y1), (x2, y2) = a, b
    z = D * x1 * x2 * y1 * y2
    return (x1 * y2 + x2 * y1) * pow(1 + z, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - z, -1, P) % P


def times(n: int, point: Point) -> Point:
    result = (0, 1)
    while n:
        result = add(result, point) if n & 1 else result
        point, n = add(point, point), n >> 1
    return result


def decode(data: bytes) -> Point:
    number = int.from_bytes(data, "little")
    sign, y = number >> 255, number & (2**255 - 1)
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    x = x if x * x % P == square else x * pow(2, (P - 1) // 4, P) % P
    assert x * x % P == square
    return (x if x & 1 == sign else P - x), y


def rfc_8032_accepts(public: bytes, message: bytes, signature: bytes) -> bool:
    base = decode((4 * pow(5, -1, P) % P).to_bytes(32, "little"))
    r, s = signature[:32], int.from_bytes(signature[32:], "little")
    h = int.from_bytes(hashlib.sha512(r + public + message).digest(), "little") % ORDER
    return s < ORDER and times(s, base) == add(decode(r), times(h, decode(public)))


@dataclass(frozen=True)
class Keys:
    private: Path
    public: Path

    @property
    def key(self) -> PrivateKey:
        return read_private_key(self.private)

    @property
    def trusted(self) -> tuple[PublicKey, ...]:
        return (read_public_key(self.public),)


def make(folder: Path, name: str) -> Keys:
    keys = Keys(folder / f"{name}.key", folder / f"{name}.pub")
    make_keys(keys.private, keys.public)
    return keys


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make(tmp_path_factory.mktemp("keys"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make(tmp_path_factory.mktemp("keys"), "theirs")


@pytest.fixture
def unsigned(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.path, tmp_path / "toy.reel"))


@pytest.fixture
def signed(unsigned: Path, ours: Keys) -> Path:
    return sign_bundle(unsigned, ours.key).path


def test_the_oracle_of_this_file_passes_the_first_test_of_the_rfc() -> None:
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    signature = bytes.fromhex(
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )
    assert rfc_8032_accepts(public, b"", signature)
    assert not rfc_8032_accepts(public, b"x", signature)


def test_a_signature_is_that_of_the_manifest_by_the_rfc(signed: Path, ours: Keys) -> None:
    fields, manifest = json.loads((signed / "signature.json").read_bytes()), (signed / "manifest.json").read_bytes()
    public, signature = bytes.fromhex(fields["public_key"]), bytes.fromhex(fields["signature"])
    assert public == ours.trusted[0].raw
    assert rfc_8032_accepts(public, PREFIX + manifest, signature)
    assert not rfc_8032_accepts(public, manifest, signature)


def test_a_signed_bundle_opens_with_its_key_and_says_whose_it_is(signed: Path, ours: Keys, theirs: Keys) -> None:
    bundle = Bundle.open(signed, (*theirs.trusted, *ours.trusted))
    assert bundle.signed_by == ours.trusted[0]
    assert f"signed by {ours.trusted[0]}" in describe(bundle)
    assert describe_json(bundle)["signed_by"] == f"ed25519:{ours.trusted[0].raw.hex()}"
    assert bundle.total_bytes == sum(f.stat().st_size for f in signed.rglob("*") if f.is_file())


def test_without_a_key_to_trust_an_unsigned_bundle_opens(unsigned: Path) -> None:
    assert Bundle.open(unsigned).signed_by is None
    assert "not signed" in describe(Bundle.open(unsigned))


def test_an_unsigned_bundle_is_refused_where_a_signature_is_required(unsigned: Path, ours: Keys) -> None:
    with pytest.raises(BundleError, match=rf"toy\.reel is not signed, and only what {ours.trusted[0]} signed is accepted"):
        Bundle.open(unsigned, ours.trusted)


def test_a_bundle_signed_by_another_is_refused_with_both_keys(signed: Path, ours: Keys, theirs: Keys) -> None:
    with pytest.raises(BundleError, match=f"is signed by {ours.trusted[0]}, and only what {theirs.trusted[0]} signed"):
        Bundle.open(signed, theirs.trusted)


def forge(path: Path, find: bytes, put: bytes) -> None:
    assert find in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(find, put, 1))


def test_a_manifest_that_was_changed_and_hashed_again_is_refused_before_it_is_read(signed: Path, ours: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((signed / "manifest.json").read_bytes())
    manifest["settings"] = {"size": [8, 8]}
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(canonical_json(manifest)).hexdigest()
    (signed / "manifest.json").write_bytes(canonical_json(manifest))
    monkeypatch.setattr(bundle_module, "_parse_manifest", lambda *_: pytest.fail("the manifest was used"))
    for trusted in (ours.trusted, ()):
        with pytest.raises(BundleError, match=r"signature\.json: the signature is not that of its manifest"):
            Bundle.open(signed, trusted)


@pytest.mark.parametrize("name", ["plan.json", "programs/denoise.l4.json", "weights.safetensors", "solvers/euler.json", "MODEL_CARD.md"])
def test_a_file_that_was_changed_after_signing_is_refused(signed: Path, ours: Keys, name: str) -> None:
    data = bytearray((signed / name).read_bytes())
    data[-2] ^= 1
    (signed / name).write_bytes(data)
    with pytest.raises(BundleError, match=name):
        Bundle.open(signed, ours.trusted)


@pytest.mark.parametrize("document", [b"", b"[]", b'{"algorithm": "none"}', b'{"algorithm": "ed25519", "public_key": "00", "signature": "00"}'])
def test_a_damaged_signature_is_refused(signed: Path, ours: Keys, document: bytes) -> None:
    (signed / "signature.json").write_bytes(document)
    with pytest.raises(BundleError, match="the signature file is damaged"):
        Bundle.open(signed, ours.trusted)


def test_the_signature_of_one_bundle_does_not_fit_another(signed: Path, ours: Keys, compile_toy: Callable[..., Bundle], tmp_path: Path) -> None:
    other = Path(shutil.copytree(signed, tmp_path / "other.reel"))
    (signed / "signature.json").unlink()
    forge(other / "MODEL_CARD.md", b"Toy", b"Cat")
    manifest = json.loads((other / "manifest.json").read_bytes())
    manifest["files"]["MODEL_CARD.md"]["sha256"] = hashlib.sha256((other / "MODEL_CARD.md").read_bytes()).hexdigest()
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(canonical_json(manifest)).hexdigest()
    (other / "manifest.json").write_bytes(canonical_json(manifest))
    with pytest.raises(BundleError, match="not that of its manifest"):
        Bundle.open(other, ours.trusted)


def test_a_damaged_bundle_is_not_signed(unsigned: Path, ours: Keys) -> None:
    forge(unsigned / "MODEL_CARD.md", b"Toy", b"Cat")
    with pytest.raises(BundleError, match="MODEL_CARD"):
        sign_bundle(unsigned, ours.key)
    assert not (unsigned / "signature.json").exists()


def test_another_bundle_than_the_one_that_was_made_is_not_signed(unsigned: Path, ours: Keys) -> None:
    meant = Bundle.open(unsigned)
    meant.manifest["sha256"] = "0" * 64
    with pytest.raises(BundleError, match="was exchanged since it was made, and what lies there now was not signed"):
        sign_bundle(unsigned, ours.key, meant)
    assert not (unsigned / "signature.json").exists()


def test_the_graph_of_a_program_must_be_the_one_that_the_plan_names(unsigned: Path) -> None:
    """Else a bundle could give another one's name to its engines in a cache that both use."""
    manifest = json.loads((unsigned / "manifest.json").read_bytes())
    programs = manifest["programs"]["denoise"]
    programs["l3"]["file"], programs["l4"]["file"] = programs["l4"]["file"], programs["l3"]["file"]
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(canonical_json(manifest)).hexdigest()
    (unsigned / "manifest.json").write_bytes(canonical_json(manifest))
    with pytest.raises(BundleError, match="'denoise' at profile 'l4' is not the graph"):
        Bundle.open(unsigned)


def test_a_private_key_is_its_owners_alone_and_never_overwritten_nor_shown(ours: Keys) -> None:
    assert stat.S_IMODE(ours.private.stat().st_mode) == 0o600
    before = ours.private.read_bytes()
    with pytest.raises(ConfigError, match="exist"):
        make_keys(ours.private, ours.public)
    assert ours.private.read_bytes() == before
    assert repr(ours.key) == f"PrivateKey(of {ours.trusted[0]})"


@pytest.mark.parametrize("order", range(8))
def test_a_key_of_small_order_is_refused(order: int, unsigned: Path, tmp_path: Path) -> None:
    found = (times(ORDER, decode(n.to_bytes(32, "little"))) for n in (4, 9, 14, 15, 16, 18))  # what is left of a point without its part of prime order
    generator = next(point for point in found if times(4, point) != (0, 1))
    x, y = times(order, generator)
    raw = (y | (x & 1) << 255).to_bytes(32, "little")
    assert times(8, (x, y)) == (0, 1)
    pem = Ed25519PublicKey.from_public_bytes(raw).public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "small.pub").write_bytes(pem)
    with pytest.raises(ConfigError, match="small order"):
        read_public_key(tmp_path / "small.pub")
    (unsigned / "signature.json").write_bytes(canonical_json({"algorithm": "ed25519", "public_key": raw.hex(), "signature": bytes(64).hex()}))
    with pytest.raises(BundleError, match="small order"):
        Bundle.open(unsigned)


@pytest.mark.parametrize("name", ["", ".", "/", ".."])
def test_a_name_that_no_file_can_have_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["keygen", name]) == 2
    assert "is no name for a pair of keys" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_secret_whose_public_half_cannot_be_written_does_not_stay(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write the key .*a\.pub: No such file"):
        make_keys(tmp_path / "a.key", tmp_path / "none" / "a.pub")
    assert not [*tmp_path.iterdir()]


def test_the_wrong_half_of_a_pair_is_refused(ours: Keys, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read a private key"):
        read_private_key(ours.public)
    with pytest.raises(ConfigError, match="cannot read a public key"):
        read_public_key(ours.private)
    with pytest.raises(ConfigError, match="cannot read a public key"):
        read_public_key(tmp_path / "none.pub")


def test_the_command_line_makes_keys_signs_and_refuses(unsigned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        assert cli.main(["keygen", str(tmp_path / name)]) == 0
    assert "keep it secret" in capsys.readouterr().out
    require = ["--require-signature", str(tmp_path / "b.pub"), "--cache", str(tmp_path / "cache")]
    commands = (["finalize", str(unsigned)], ["sample", str(unsigned), "a cat", "-o", str(tmp_path / "cat.png")], ["serve", str(unsigned), "--port", "0"])
    for command in commands:
        assert cli.main([*command, *require]) == 1
        assert "is not signed" in capsys.readouterr().err
    assert cli.main(["sign", str(unsigned), "--key", str(tmp_path / "a.key")]) == 0
    assert "signed by ed25519:" in capsys.readouterr().out
    for command in commands:
        assert cli.main([*command, *require]) == 1
        assert "is signed by ed25519:" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
