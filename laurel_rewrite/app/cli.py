"""The command. Only click is imported here at the start, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence

import click
from click.shell_completion import shell_complete

from laurel_rewrite.app.command_help import Verbs
from laurel_rewrite.app.compare_command import compare
from laurel_rewrite.app.doctor_command import doctor
from laurel_rewrite.app.export_command import export
from laurel_rewrite.app.inspect_command import inspect
from laurel_rewrite.app.operators_command import operators
from laurel_rewrite.app.profile_command import profile
from laurel_rewrite.app.rewrite_command import rewrite
from laurel_rewrite.app.sites_command import sites
from laurel_rewrite.errors import CaptureError, ConfigError, LaurelError, NoSiteError

COMMANDS = {
    "sites": sites, "operators": operators, "compare": compare, "inspect": inspect, "export": export, "profile": profile, "doctor": doctor,
}  # fmt: skip
"""By their words; what no word is said of is `rewrite`."""
_POINTER = "(docs: troubleshooting#{})"
"""The section of a page in `docs` on what went wrong."""
NAME = "laurel-rewrite"
MAIN = Verbs(NAME, commands={"": rewrite, **COMMANDS})
_COMPLETE = "_LAUREL_REWRITE_COMPLETE"
"""The variable by which a shell asks what may follow, as click's scripts for shells name it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `laurel-rewrite`: the default action is `rewrite`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if asked := os.environ.get(_COMPLETE):
        sys.exit(shell_complete(MAIN, {}, NAME, _COMPLETE, asked))
    try:
        code = MAIN.main(given, prog_name=NAME, standalone_mode=False)
        sys.stdout.flush()
    except (click.exceptions.Abort, KeyboardInterrupt):
        _stop("Interrupted.", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(ConfigError.exit_code)
    except LaurelError as error:
        _fail(f"{'Nothing to do' if isinstance(error, NoSiteError) else 'Error'}: {error.args[0]}", type(error))
    except SystemExit as error:  # our own are raised below: this one is a model's, or click's own for a reader that is gone
        if isinstance(error.__context__, BrokenPipeError):
            raise
        _fail(f"Error: the model's code ended the program with sys.exit({error.code!r}). Nothing was written.", CaptureError)
    except BrokenPipeError:  # the reader has seen enough
        _drop_stdout()
        sys.exit(1)
    except OSError as error:
        if error.filename is not None or error.errno != errno.ENOSPC:
            _unexpected(error, given)
        _drop_stdout()
        _fail(f"Error: the output cannot be printed: {error.strerror}.", ConfigError)
    except Exception as error:  # the last net; a traceback would say as little to a user
        _unexpected(error, given)
    except BaseException as error:  # which no code of ours raises
        _fail(f"Error: the model's code raised {type(error).__name__}: {error}. Nothing was written.", CaptureError)
    if isinstance(code, int) and code:  # of a command that has said why
        sys.exit(code)


def _unexpected(error: Exception, arguments: Sequence[str]) -> None:
    if {"-v", "--verbose"} & set(arguments):
        traceback.print_exc()
    first = next(iter(str(error).strip().splitlines()), "")[:300]
    text = f"Internal error: {type(error).__name__}: {first}. Please report it, with the traceback that --verbose shows."
    _stop(f"{text} {_POINTER.format('internal-error')}", 70)


def _fail(message: str, kind: type[LaurelError]) -> None:
    """End with an error of this kind, and say where the documentation has it."""
    _stop(f"{message} {_POINTER.format(kind.section())}", kind.exit_code)


def _stop(message: str, code: int) -> None:
    with contextlib.suppress(OSError):  # standard error may be full or closed, too
        click.echo(message, err=True)
    sys.exit(code)


def _drop_stdout() -> None:
    """Let nothing be written at the end, which would fail once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
