"""Every error that sliplm raises, in one tree.

    SlipError
    ├── InputError              a tensor, token or argument that cannot be used (NaN, wrong shape)
    │   ├── PrecisionError      an input of which rounding to integers leaves nothing
    │   └── SecretError         what holds secrets was to be copied or pickled
    ├── CheckpointError         the folder is not a checkpoint, or a shard is missing or damaged
    │   ├── UnsplittableError   modules that hold weights in a form that cannot be split, by name
    │   └── AdapterError        an adapter that is incomplete, of another model or of another kind
    ├── RecipeError             the recipe asks for what the model does not allow
    ├── LedgerError             this model was split before, or the ledger that would know cannot be used
    ├── ShareError              a share on disk is missing, incomplete or damaged
    │   ├── MismatchError       two shares, or a share and a worker, of different splits
    │   ├── SealError           a sealed file does not open: another key, or altered bytes
    │   └── SignatureError      a worker share is not signed, or not by whom it should be
    ├── MaskError               a mask would be used twice, or masks cannot be made
    │   ├── PoolError           a pool of masks on disk is a copy, restored, damaged, empty or in use
    │   ├── DealerError         a dealer lies, is silent or gone
    │   └── ForkError           a forked child would use what its parent uses
    ├── KernelError             no kernel on this machine computes exact products
    │   └── CardError           a GPU that was named is missing, too small, or wrong
    ├── CredentialError         keys or certificates are missing, readable by others, revoked or refused
    │   ├── AttestationError    the evidence of what runs at the other end is missing or refused
    │   └── PassingCredentialError  our own keys, or a date, cannot be used for now, or the peer refuses ours
    │       └── OwnEvidenceError    (an AttestationError too) our own evidence cannot be made, or is refused
    ├── WireError               bytes from a peer that break the protocol
    ├── WorkerError             a worker cannot serve
    │   ├── WorkerUnavailable   nobody listens there, or the connection broke
    │   ├── WorkerTimeout       no answer within the limit
    │   ├── WorkerFault         the worker answered that it cannot
    │   └── VerificationError   the worker's product is wrong
    │       └── ExhaustedError  so many were wrong that no other can be checked
    ├── BusyError               a server has no room for a request now
    ├── ClusterError            a cluster that was named is missing, may not be used, or has lost a task
    ├── PlaceError              no folder for a file that nobody named: no home, or none that can be written
    ├── FetchError              a package that carries an example cannot be fetched
    └── ReportError             a report cannot be made: a library is missing

A message says what happened, then what to do.  No message carries a weight, a mask or a key.

`SlipWarning` is no error: what a split, or a run, is warned about, and goes on.
"""

from __future__ import annotations


class SlipError(Exception):
    """Base of all errors of sliplm."""


class SlipWarning(UserWarning):
    """What the owner should know about a split or a run that goes on."""


class InputError(SlipError, ValueError):
    """A tensor, token or argument that cannot be used."""


class PrecisionError(InputError):
    """An input of which rounding to integers leaves nothing."""


class SecretError(InputError, TypeError):
    """An object that holds secrets was to be copied, pickled or sent to another process."""


class CheckpointError(SlipError):
    """The folder is not a checkpoint, or a part of it is missing or damaged."""


class UnsplittableError(CheckpointError):
    """The model has modules whose weights cannot be split.

    Attributes:
        modules: their names, as the recipe's patterns match them.
    """

    def __init__(self, message: str, modules: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.modules = modules


class AdapterError(CheckpointError):
    """An adapter is incomplete, belongs to another model, or is of no kind that can be kept exactly."""


class RecipeError(SlipError, ValueError):
    """The recipe asks for what the model does not allow."""


class LedgerError(SlipError):
    """This model, or a close relative, was split before; or the ledger of splits cannot be read or written.

    Attributes:
        splits: ids of the earlier splits, the closest first; empty if the ledger itself is the trouble.
    """

    def __init__(self, message: str, splits: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.splits = splits


class ShareError(SlipError):
    """A share on disk is missing, incomplete or damaged."""


class MismatchError(ShareError):
    """Two shares, or a share and a worker, that come from different splits."""


class SealError(ShareError):
    """A sealed file does not open: the key is another one, or the bytes were altered."""


class SignatureError(ShareError):
    """A worker share is not signed, or by another key, or is not the one that was signed."""


class MaskError(SlipError):
    """A mask would be used twice, or masks cannot be made."""


class PoolError(MaskError):
    """A pool of masks on disk cannot be used: a copy, a restored backup, damaged, empty or in use."""


class DealerError(MaskError):
    """A dealer lies, is silent or gone.

    Attributes:
        address: the dealer's address, or None where it is not known.
    """

    def __init__(self, message: str, address: str | None = None) -> None:
        super().__init__(message)
        self.address = address


class ForkError(MaskError):
    """A forked child would use its parent's masks and connections."""


class KernelError(SlipError):
    """No kernel on this machine computes exact products."""


class CardError(KernelError):
    """A GPU is missing, has too little memory, fails, or does not compute exact products."""


class CredentialError(SlipError):
    """Keys or certificates are missing, readable by others, revoked, or refused by the peer."""


class AttestationError(CredentialError):
    """The evidence of what runs at the other end is missing, stale or refused."""


class PassingCredentialError(CredentialError):
    """Keys that cannot be used for now: a file of ours is absent, a date has passed, a clock is wrong, the
    peer refuses our certificate, or a verifier of ours fails.

    It proves no guilt of the peer's: it is asked again after a pause.
    """


class OwnEvidenceError(AttestationError, PassingCredentialError):
    """Our own evidence cannot be made, takes too long, or is refused by the peer."""


class WireError(SlipError):
    """Bytes from a peer that break the protocol; the connection is closed."""


class WorkerError(SlipError):
    """A worker cannot serve.

    Attributes:
        address: the worker's address, or None where it is not known.
    """

    def __init__(self, message: str, address: str | None = None) -> None:
        super().__init__(message)
        self.address = address


class WorkerUnavailable(WorkerError):
    """Nobody listens at the address, or the connection broke.

    Attributes:
        torn: whether it broke inside a frame of the peer's.
    """

    torn: bool = False


class WorkerTimeout(WorkerError):
    """The worker did not answer within the limit."""


class WorkerFault(WorkerError):
    """The worker answered that it cannot serve the request."""


class VerificationError(WorkerError):
    """The worker's product is wrong: it was detected before use, and the worker is quarantined."""


class ExhaustedError(VerificationError):
    """Wrong products used up a group's challenges: no product of it can be checked any more."""


class BusyError(SlipError):
    """A server has no room for a request now: ask again later."""


class ClusterError(SlipError):
    """A cluster that was named is missing, may not be used as it is, or has lost a task for good."""


class PlaceError(SlipError):
    """There is no folder for a file whose place nobody named: no home, or none that can be written."""


class FetchError(SlipError):
    """A package that carries an example model or text cannot be fetched."""


class ReportError(SlipError):
    """A report cannot be made: a library that draws or writes it is missing."""
