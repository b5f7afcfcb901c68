# Sourced by scripts/demo, scripts/test and .ci/run: makes .venv and gets the demo model, and does nothing twice.
# Kept to bash 3.2, which is what macOS has.

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/.installed  # "<fingerprint> <extra>...": written last, so an interrupted installation leaves none

say() { printf '%s: %s\n' "$(basename -- "$0")" "$*" >&2; }
die() { say "$@"; exit 1; }

find_python() {
    local python
    for python in python3 python3.13 python3.12 python3.11 python3.10; do
        # Run it: a name on PATH may be a launcher with nothing behind it.
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            printf '%s\n' "$python"
            return
        fi
    done
    die "Python >= 3.10 is needed, python3 is $(python3 -V 2>/dev/null || echo absent): install one and put it on PATH"
}

make_venv() {
    local python
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
        die "$python has no venv or ensurepip module: install it (Debian, Ubuntu: apt install python3-venv)"
    say "making .venv with $("$python" -V)"
    "$python" -m venv --clear "$venv"
}

# False for a half-made .venv, a Python that was removed or is too old, and a folder that was moved (scripts in
# .venv/bin name it).
venv_works() {
    "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 &&
        grep -qF "$venv/bin/python" "$venv/bin/pip"
}

# All that decides what is installed. The version of Python is in pyvenv.cfg, so that no Python needs to start.
fingerprint() {
    (cd "$root" && { pwd && cat .venv/pyvenv.cfg pyproject.toml constraints.txt scripts/setup.sh; } | cksum)
}

# install_package base|test|dev: the package with that extra; each holds the ones before it.
install_package() {
    local extras target=. quiet=
    case $1 in
        base) extras="base" ;;
        test) extras="base test" target=".[test]" ;;
        dev) extras="base test dev" target=".[dev]" ;;
        *) die "no such set of dependencies: $1" ;;
    esac
    if [ -x "$venv/bin/python" ] && [ -f "$stamp" ]; then
        case "$(cat "$stamp") " in "$(fingerprint)"*" $1 "*) return ;; esac
    fi

    rm -f "$stamp"
    venv_works || make_venv
    say "installing the package and its pinned dependencies ($extras) into .venv: the first time takes minutes"
    [ -t 2 ] || quiet=--quiet
    # pip first: its own version decides what the second line understands.
    (
        # setuptools warns of every editable installation, at length.
        cd "$root" && export PIP_NO_INPUT=1 PYTHONWARNINGS="ignore:Editable installation" &&
            .venv/bin/python -m pip install $quiet --constraint constraints.txt pip &&
            .venv/bin/python -m pip install $quiet --constraint constraints.txt --build-constraint constraints.txt \
                --editable "$target"
    ) >&2 </dev/null || die "pip could not install the package (see above): run this again, it goes on where it stopped"
    printf '%s %s\n' "$(fingerprint)" "$extras" >"$stamp"
}

get_model() { "$venv/bin/llama" get; }
