"""CurveZMQ keys of the machines of a deployment (``biscale hw keys``).

Every machine has a folder of its own: its secret, and the public keys of all machines. Only that
folder is copied to it. Who has no secret of the deployment can neither read what a machine
publishes nor be heard, and who cannot prove to be the machine that was called is not talked to.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth

from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole

OWN = "own"
PEERS = "peers"


@dataclass(frozen=True)
class Keyring:
    """What one machine needs to prove who it is and to know the others.

    Attributes:
        public: own public key, Z85.
        secret: own secret key, Z85.
        peers: public key of every machine by name.
    """

    public: bytes
    secret: bytes
    peers: dict[str, bytes]

    def __repr__(self) -> str:
        """Without the secret."""
        return f"Keyring(peers={sorted(self.peers)})"

    @classmethod
    def read(cls, folder: Path) -> "Keyring":
        """Read the folder of one machine.

        Raises:
            BiscaleError: it is not there or not whole, or others can read the secret.
        """
        secret = folder / f"{OWN}.key_secret"
        try:
            mode = secret.stat().st_mode
            public, private = zmq.auth.load_certificate(secret)
            peers = {
                path.stem: zmq.auth.load_certificate(path)[0]
                for path in sorted((folder / PEERS).glob("*.key"))
            }
        except (OSError, ValueError):
            raise BiscaleError(
                f"{folder} holds no keys of a machine: make them with `biscale hw keys`, and copy "
                "the folder of this machine here"
            ) from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise BiscaleError(f"others can read the secret key {secret}: chmod 600 {secret}")
        if private is None or not peers:
            raise BiscaleError(f"{folder} lacks a secret key or the keys of the other machines")
        return cls(public, private, peers)

    def public_of(self, peer: str) -> bytes:
        """Public key of a machine.

        Raises:
            BiscaleError: it is not known here.
        """
        if peer not in self.peers:
            raise BiscaleError(
                f"the keys hold no machine '{peer}', only {', '.join(self.peers)}: make keys for "
                "the deployment as it is now"
            )
        return self.peers[peer]

    def name_of(self, public: bytes) -> str | None:
        """Name of the machine with this public key; None: nobody of this deployment."""
        return next((name for name, key in self.peers.items() if key == public), None)


def make_keys(folder: Path, machines: Sequence[str]) -> list[Path]:
    """Make a folder of keys for every machine; what exists is never replaced.

    Machines that have keys already keep them, so that one can be added later.

    Args:
        folder: parent of the machines' folders.
        machines: their names.

    Returns:
        The folders, in the order of the names.

    Raises:
        BiscaleError: a folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        public = {name: _pair(folder / name) for name in machines}
        for name in machines:
            for peer, key in public.items():
                target = folder / name / PEERS / f"{peer}.key"
                target.parent.mkdir(mode=0o700, exist_ok=True)
                write_whole(target, key)
    except OSError as error:
        raise BiscaleError(f"cannot write keys to {folder}: {error.strerror}") from None
    return [folder / name for name in machines]


def _pair(folder: Path) -> bytes:
    """The public key file of a machine, made with its secret where there is none yet."""
    folder.mkdir(mode=0o700, exist_ok=True)
    secret = folder / f"{OWN}.key_secret"
    if not secret.exists():
        before = os.umask(0o077)
        try:
            zmq.auth.create_certificates(folder, OWN)
        finally:
            os.umask(before)
        secret.chmod(0o600)
    return (folder / f"{OWN}.key").read_bytes()
