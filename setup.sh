#!/bin/sh
# Makes .venv with the tested versions. Typed again after an interruption it goes on: pip keeps what is installed.
set -eu
cd "$(dirname "$0")"

stop() {
    echo "setup: $*" >&2
    exit 2
}

python=
for name in ${PYTHON:-python3.12 python3.11 python3.10 python3}; do
    if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
        python=$name
        break
    fi
done
[ -n "$python" ] || stop "no Python 3.10, 3.11 or 3.12 among: ${PYTHON:-python3.12 python3.11 python3.10 python3}." \
    "Install one, or say where it is: make setup PYTHON=/path/to/python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    stop "$python cannot make virtual environments. On Debian and Ubuntu: sudo apt-get install python3-venv"

export PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
# A test compares our zero-shot scores with clip-benchmark's, whose metrics need none of what else it asks for.
.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps clip-benchmark

# DeepSpeed's part in C++ is built now and not within the first run; it does without where there is no compiler.
.venv/bin/python -m train_vlm.build_ops
touch .venv/.ready
