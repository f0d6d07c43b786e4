"""The folder of a run: whose it is, and the settings it was started with."""

import fcntl
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

from configs import UserError, say
from configs.settings import DEFAULTS, RESUMABLE, Config, is_marked, read_settings

locks = {}  # folder: the open file that holds its lock until the process ends


def changed_settings(config: Config, path: Path) -> list[str]:
    """The settings that differ from those of the run in a folder, and make it another run.

    path: the folder's config.yaml. What that lacks had its default: it is newer than the run.
    """
    begun = [*path.parent.glob("metrics.jsonl"), *path.parent.glob("checkpoint-*")]
    if not path.is_file() or not begun:
        return []
    mine = yaml.safe_load(as_yaml(config))
    theirs = yaml.safe_load(yaml.safe_dump(DEFAULTS)) | read_settings(path)
    return [name for name in mine if mine[name] != theirs[name] and not is_marked(name, RESUMABLE)]


def as_yaml(config: Config) -> str:
    """All settings, in the order of the class."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def save_config(config: Config, path: Path) -> None:
    """Writes the config with the command line and the commit; a kill leaves the old one."""
    here = shlex.quote(str(Path(__file__).parent))
    describe = f"git -C {here} describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null"
    commit = subprocess.getoutput(describe)
    new = path.with_suffix(".new")
    new.write_text(f"# {sys.argv}\n# git {commit}\n{as_yaml(config)}")
    new.rename(path)


def lock_folder(folder: Path) -> None:
    """Takes the folder for this process, or UserError: one process at a time writes there."""
    locks[folder] = open(folder / "lock", "w")
    try:
        fcntl.lockf(locks[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"output_dir={folder}: another process writes there, end it") from None
    except OSError as error:
        say(f"output_dir={folder} cannot be locked, see that no other run uses it: {error}")
