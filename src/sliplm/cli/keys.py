"""`slip keys`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sliplm.cli.options import Json, Key
from sliplm.cli.screen import console, key_option, print_json, say, warn_of_new_key
from sliplm.errors import LedgerError
from sliplm.network import authority
from sliplm.network.authority import Issued
from sliplm.network.keys import KEY, now

app = typer.Typer(help="Keys for the link between vault and worker.", no_args_is_help=True)

_Folder = Annotated[Path, typer.Argument(help="The folder that `slip keys init` made.")]
_Days = Annotated[int, typer.Option(help="Days until the certificate expires.")]


@app.callback()
def group() -> None:
    """Keys for the link between vault and worker.

    An authority of your own signs a certificate for each party. Keep its folder offline; each party gets
    its own folder and nothing else.
    """


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(help="Where to make authority, vault, worker and dealer.")],
    days: Annotated[int, typer.Option(help="Days until the certificates expire.")] = authority.DAYS,
    json: Json = False,
) -> None:
    """Make a private authority, and a certificate each for a vault, a worker and a dealer.

    Example: slip keys init keys
    """
    authority.init(folder, days)
    made = {name: str(folder / name) for name in ("authority", "vault", "worker", "dealer")}
    if json:
        print_json(made)
        return
    say(f"{made['vault']} goes to the vault, {made['worker']} to the worker,")
    say(f"{made['dealer']} to a dealer, if another machine deals masks;")
    say(f"keep {made['authority']} offline.")


@app.command("signing")
def signing_key(
    folder: Annotated[Path, typer.Argument(help="Where to make key.pem and public.pem.")], json: Json = False
) -> None:
    """Make a key that signs worker folders, for `slip sign`.

    Example: slip keys signing signer
    """
    from sliplm.parties.signing import PUBLIC, make_key

    make_key(folder)
    if json:
        print_json({"key": str(folder / KEY), "public": str(folder / PUBLIC)})
        return
    say(f"{folder / KEY} stays with you and signs; {folder / PUBLIC} goes to whoever serves what you sign.")


@app.command("issue")
def issue(
    folder: _Folder,
    name: Annotated[str, typer.Argument(help="The party's name: 1 to 63 of a-z, 0-9 and -.")],
    role: Annotated[str, typer.Option(help="vault, worker or dealer.")] = "worker",
    days: _Days = authority.DAYS,
    json: Json = False,
) -> None:
    """Make the key folder of one more vault, worker or dealer.

    Example: slip keys issue keys worker-2
    """
    made = authority.issue(folder, authority.role_of(role), name, days)
    if json:
        print_json({"name": name, "role": role, "folder": str(made)})
        return
    say(f"{made} goes to the {role} {name}.")


@app.command("list")
def list_issued(folder: _Folder, json: Json = False) -> None:
    """Show every certificate that the authority has signed.

    Example: slip keys list keys
    """
    found = authority.issued(folder)
    if json:
        print_json({"certificates": [entry.model_dump(mode="json") for entry in found]})
        return
    table = Table("name", "role", "state", "until", "serial", box=None, pad_edge=False)
    table.columns[-1].overflow = "fold"
    for entry in found:
        table.add_row(entry.name, entry.role, _state(entry), f"{entry.not_after:%Y-%m-%d}", entry.serial)
    console().print(table)


@app.command("revoke")
def revoke(
    folder: _Folder,
    which: Annotated[str, typer.Argument(help="A name, or a serial number from `slip keys list`.")],
    json: Json = False,
) -> None:
    """Take certificates back: who has the new list drops their holder within a second.

    The list is written to every party's folder under FOLDER. To a party on another machine, copy
    FOLDER/authority/revoked.pem into its key folder; no restart is needed.

    Example: slip keys revoke keys worker
    """
    revoked = authority.revoke(folder, which)
    if json:
        print_json({"revoked": [entry.model_dump(mode="json") for entry in revoked]})
        return
    for entry in revoked:
        say(f"revoked: {entry.role} {entry.name}, serial {entry.serial}")
    _remind(folder)


@app.command("rotate")
def rotate(
    folder: _Folder,
    name: Annotated[str, typer.Argument(help="The party's name.")],
    days: _Days = authority.DAYS,
    json: Json = False,
) -> None:
    """Give a party a new key and certificate, and revoke its old ones.

    Copy FOLDER/NAME to the party if it is on another machine, and revoked.pem to all; no restart is needed.

    Example: slip keys rotate keys worker
    """
    made = authority.rotate(folder, name, days)
    if json:
        print_json(made.model_dump(mode="json"))
        return
    say(f"{folder / name} holds a new key, certificate {made.serial}; the old ones are revoked.")
    _remind(folder)


@app.command("reseal")
def reseal(
    vault: Annotated[Path, typer.Argument(help="The vault folder that a split wrote.")],
    key: Key = None,
    new_key: Annotated[str | None, typer.Option(help="The key that seals it from now on.")] = None,
    json: Json = False,
) -> None:
    """Seal a vault folder with another key.

    A key is file:PATH, env:NAME, command:CMD, passphrase, passphrase:env:NAME or passphrase:file:PATH.
    The old key still opens old copies of the folder's seal.json: against that, split again. The ledger knows
    the split under the new key too.

    Example: slip keys reseal out/vault --new-key passphrase
    """
    from sliplm.shares.ledger import VAULT_FILE, add
    from sliplm.shares.sealing import reseal as change

    new = change(vault, key, new_key)
    if new.made:
        warn_of_new_key()
    if (vault / VAULT_FILE).exists():
        try:
            add(vault, new)
        except LedgerError as error:  # the vault is sealed all the same
            again = f"slip ledger add {shlex.quote(str(vault))}{key_option(new_key)}"
            say(f"not noted in the ledger: {error}; then: {again}", err=True)
    if json:
        print_json({"resealed": str(vault)})
        return
    say(f"{vault} opens with the new key.")


def _state(entry: Issued) -> str:
    if entry.revoked is not None:
        return "revoked"
    return "expired" if entry.not_after < now() else "good"


def _remind(folder: Path) -> None:
    say(f"Copy {folder / 'authority' / 'revoked.pem'} to the key folders on other machines.")
