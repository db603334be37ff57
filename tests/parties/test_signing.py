"""Signed worker shares: whose a share is, judged before it is served, by real `slip worker` processes too."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

import families
from sliplm.engines.transformers.convert import split
from sliplm.errors import CredentialError, InputError, ShareError, SignatureError
from sliplm.network import authority
from sliplm.parties.signing import check, make_key, sign
from sliplm.shares.share import MANIFEST, SHARE, SIGNATURE, open_worker

pytest.importorskip("model_signing", reason="pip install 'sliplm[signing]'")
SLIP = [sys.executable, "-m", "sliplm"]
ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
NO_PASSPHRASE = serialization.NoEncryption()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed share in `worker`, its key in `signer`, and another's key in `other`."""
    folder = tmp_path_factory.mktemp("signing")
    split(families.make("llama", folder / "model", num_hidden_layers=1), folder / "out")
    shutil.move(folder / "out" / "worker", folder / "worker")
    make_key(folder / "signer")
    make_key(folder / "other")
    sign(open_worker(folder / "worker"), folder / "signer" / "key.pem")
    return folder


@pytest.fixture
def share(made: Path, tmp_path: Path) -> Path:
    """A copy of the signed share, to be damaged."""
    return Path(shutil.copytree(made / "worker", tmp_path / "worker"))


def alter(share: Path) -> None:
    """Change one weight, and the manifest with it, so that the share is whole but for its signature."""
    data = bytearray((share / SHARE).read_bytes())
    data[-1] ^= 1
    (share / SHARE).write_bytes(data)
    manifest = json.loads((share / MANIFEST).read_bytes())
    manifest["files"][SHARE]["sha256"] = hashlib.sha256(data).hexdigest()
    (share / MANIFEST).write_text(json.dumps(manifest))
    open_worker(share)


def worker(share: Path, signed_by: Path) -> subprocess.Popen[str]:
    command = [*SLIP, "worker", str(share), "--listen", f"unix:{share}.sock", "--json", "--device", "cpu"]
    return subprocess.Popen(
        [*command, "--signed-by", str(signed_by)],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_worker_serves_what_was_signed_and_nothing_else(made: Path, tmp_path: Path) -> None:
    shares = [
        shutil.copytree(made / "worker", tmp_path / name) for name in ("good", "bare", "changed", "alien")
    ]
    (shares[1] / SIGNATURE).unlink()
    alter(shares[2])
    keys = [made / name / "public.pem" for name in ("signer", "signer", "signer", "other")]
    started = [worker(*given) for given in zip(shares, keys, strict=True)]
    try:
        assert started[0].stdout is not None
        ready = json.loads(started[0].stdout.readline())
        assert ready["listening"] == f"unix:{shares[0]}.sock"
        for process, share, why in zip(
            started[1:], shares[1:], ("is not signed", "Hash mismatch for", "Key mismatch"), strict=True
        ):
            said, complaint = process.communicate(timeout=300)
            assert process.returncode == 2, complaint
            assert json.loads(said)["error"] == "SignatureError"  # and no ready line before it
            assert why in complaint
            assert not Path(f"{share}.sock").exists()
        started[0].terminate()
        assert started[0].wait(300) == 0
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_commands(share: Path, tmp_path: Path) -> None:
    (share / SIGNATURE).unlink()

    def slip(*words: object, status: int = 0) -> dict[str, str]:
        done = subprocess.run(
            [*SLIP, *map(str, words), "--json"],
            env=ENV, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return found

    keys = slip("keys", "signing", tmp_path / "k")
    assert slip("sign", share, "--key", keys["key"]) == {"signature": str(share / SIGNATURE)}
    found = slip("verify", share, "--signed-by", keys["public"])
    assert found["split_id"] == open_worker(share).split_id
    alter(share)
    assert slip("verify", share, "--signed-by", keys["public"], status=2)["error"] == "SignatureError"


def test_other_tools_agree(made: Path) -> None:
    """The library's own command reads the folder itself, and finds what we signed."""
    share = made / "worker"
    words = ["--signature", share / SIGNATURE, "--public_key", made / "signer" / "public.pem"]
    command = [sys.executable, "-m", "model_signing", "verify", "key", share, *words]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=300)


@pytest.mark.parametrize("claim", [b"", b"{}", b"\xff" * 100, b"[" * 100_000, b"x" * ((1 << 20) + 1)])
def test_claims_of_any_bytes(made: Path, share: Path, claim: bytes) -> None:
    (share / SIGNATURE).write_bytes(claim)
    with pytest.raises(SignatureError):
        check(open_worker(share), made / "signer" / "public.pem")


def test_every_digest_is_signed(made: Path, share: Path) -> None:
    """Neither may a signature leave a file out, nor say that some are to be ignored."""
    import base64

    bundle = json.loads((share / SIGNATURE).read_bytes())
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    assert {r["name"]: r["digest"] for r in payload["predicate"]["resources"]} == {
        name: hashlib.sha256((share / name).read_bytes()).hexdigest() for name in (MANIFEST, SHARE)
    }
    payload["predicate"]["serialization"]["ignore_paths"] = [SIGNATURE, SHARE]
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (share / SIGNATURE).write_text(json.dumps(bundle))
    with pytest.raises(SignatureError):
        check(open_worker(share), made / "signer" / "public.pem")


def test_a_share_of_the_same_signer_is_not_another(made: Path, share: Path) -> None:
    """The signature of one share does not do for a second one by the same key."""
    old = (share / SIGNATURE).read_bytes()
    alter(share)
    sign(open_worker(share), made / "signer" / "key.pem")
    check(open_worker(share), made / "signer" / "public.pem")
    (share / SIGNATURE).write_bytes(old)
    with pytest.raises(SignatureError, match="Hash mismatch"):
        check(open_worker(share), made / "signer" / "public.pem")


def test_a_certificate_stands_for_a_key(made: Path, share: Path, tmp_path: Path) -> None:
    root, leaf = tmp_path / "root.pem", tmp_path / "leaf.pem"
    own = serialization.load_pem_private_key((made / "signer" / "key.pem").read_bytes(), None)
    assert isinstance(own, ec.EllipticCurvePrivateKey)
    certify(root, leaf, own.public_key())
    sign(open_worker(share), made / "signer" / "key.pem", leaf)
    check(open_worker(share), root)
    other = tmp_path / "other.pem"
    certify(other, tmp_path / "unused.pem", own.public_key())
    with pytest.raises(SignatureError):
        check(open_worker(share), other)
    with pytest.raises(SignatureError, match="under a certificate: name the authority"):
        check(open_worker(share), made / "signer" / "public.pem")
    sign(open_worker(share), made / "signer" / "key.pem")
    with pytest.raises(SignatureError, match="a key alone: name the signer's public key"):
        check(open_worker(share), root)
    sign(open_worker(share), made / "signer" / "key.pem", leaf)
    alter(share)
    with pytest.raises(SignatureError, match="Hash mismatch"):
        check(open_worker(share), root)


def test_the_links_authority_signs_no_shares(share: Path, tmp_path: Path) -> None:
    """Each worker holds a certificate of it."""
    authority.init(tmp_path / "keys")
    worker = tmp_path / "keys" / "worker"
    sign(open_worker(share), worker / "key.pem", worker / "certificate.pem")
    with pytest.raises(CredentialError, match="each of its workers could sign"):
        check(open_worker(share), worker / "authority.pem")


def test_keys_that_cannot_be_used(made: Path, share: Path, tmp_path: Path) -> None:
    opened, key = open_worker(share), tmp_path / "key.pem"
    with pytest.raises(CredentialError, match="is not a key folder"):
        sign(opened, key)
    key.write_bytes(ed25519.Ed25519PrivateKey.generate().private_bytes(PEM, PKCS8, NO_PASSPHRASE))
    key.chmod(0o600)
    with pytest.raises(CredentialError, match="cannot sign"):
        sign(opened, key)
    key.chmod(0o644)
    with pytest.raises(CredentialError, match="readable by others"):
        sign(opened, key)
    with pytest.raises(CredentialError, match="never overwritten"):
        make_key(made / "signer")
    public = tmp_path / "public.pem"
    public.write_bytes(b"no key")
    with pytest.raises(CredentialError, match="no public key"):
        check(opened, public)
    public.chmod(0o666)
    with pytest.raises(CredentialError, match="written by others"):
        check(opened, public)
    with pytest.raises(CredentialError, match=r"give the signer's public\.pem"):
        check(opened, tmp_path / "nothing.pem")


def test_without_the_library(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(InputError, match=r"sliplm\[signing\]"):
        check(open_worker(made / "worker"), made / "signer" / "public.pem")


def test_other_files_are_still_refused(share: Path) -> None:
    (share / "model.sig.py").write_bytes(b"")
    with pytest.raises(ShareError, match=r"model\.sig\.py"):
        open_worker(share)


def certify(root: Path, leaf: Path, public: ec.EllipticCurvePublicKey) -> None:
    """An authority for signers, and its certificate for a key that signs."""
    key, start = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    for path, name, signed, ca in ((root, "root", key.public_key(), True), (leaf, "leaf", public, False)):
        usage = x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False)
        subject, issuer = (x509.Name.from_rfc4514_string(f"CN={n}") for n in (name, "root"))
        certificate = (
            x509.CertificateBuilder(issuer, subject, signed, x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        path.write_bytes(certificate.public_bytes(PEM))
