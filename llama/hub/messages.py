"""What is told of a model that the hub does not give: in one line, with what to do and the address for it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from llama.hub.names import ModelName

OFFLINE = "HF_HUB_OFFLINE is set"


def megabytes(n_bytes: int) -> str:
    """Return a number of bytes as people read it: 98.1 MB, 4.92 GB."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def endpoint() -> str:
    """Return the address of the hub: that of HF_ENDPOINT, if it is set."""
    from huggingface_hub import constants

    return constants.ENDPOINT or "https://huggingface.co"


def http_error() -> type[Exception]:
    """Return the base of the errors of the HTTP client that huggingface_hub uses, which depends on its version."""
    from huggingface_hub import get_session

    error: type[Exception] = sys.modules[type(get_session()).__module__.partition(".")[0]].HTTPError
    return error


@contextlib.contextmanager
def told(name: ModelName) -> Iterator[None]:
    """Raise what goes wrong on the way to the hub as an OSError of one line; ConnectionError where nobody answers."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        raise _refused(name, error) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise ConnectionError(unreachable(error)) from error
    except http_error() as error:
        raise ConnectionError(unreachable(error)) from error


def unreachable(error: Exception) -> str:
    """Say that the hub does not answer, and why; it is the beginning of a sentence."""
    cause = str(error).splitlines()
    return f"{endpoint()} cannot be reached ({cause[0].rstrip('.') if cause else type(error).__name__})"


def _refused(name: ModelName, error: Exception) -> OSError:
    from huggingface_hub import errors, get_token

    assert isinstance(error, errors.HfHubHTTPError)
    page, hub = f"{endpoint()}/{name.repo}", endpoint()
    has_token = get_token() is not None
    code = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        token = (
            "with the account of your token"
            if has_token
            else f"make a token at {hub}/settings/tokens, and give it by HF_TOKEN or `hf auth login`"
        )
        return PermissionError(f"{name.repo} is gated: ask for access at {page}, {token}")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{name.repo} has no revision {name.revision!r}: {page}/commits shows which it has")
    if isinstance(error, errors.RepositoryNotFoundError):
        token = "your token may not read it" if has_token else f"give HF_TOKEN a token of {hub}/settings/tokens"
        found = f"{hub}/models?search={name.repo.partition('/')[2]} finds names"
        return FileNotFoundError(
            f"{name.repo} is neither a path here nor a model of the hub ({found}); if it is private, {token}"
        )
    if code == 401:
        return PermissionError(
            f"{hub} does not take the token of HF_TOKEN or `hf auth login` (401): make one at {hub}/settings/tokens, "
            "or unset it for public models"
        )
    if isinstance(error, errors.DisabledRepoError):
        return PermissionError(f"{name.repo} is disabled by the hub: see {page}")
    if code == 429:
        return ConnectionError(f"{hub} has had too many requests from here (429): wait some minutes, or give HF_TOKEN")
    if isinstance(error, errors.EntryNotFoundError):
        return FileNotFoundError(f"{name.repo} lacks a file that it lists ({error.response.url}): see {page}")
    words = error.server_message or error.response.reason_phrase
    return ConnectionError(f"{hub} answers {code} ({words}) for {name.repo}: see {page}, or try again later")
