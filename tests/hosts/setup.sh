#!/bin/sh
# setup.sh NAME: makes .venv-hosts/NAME from tests/hosts/NAME.txt and this package: for transformers-* with the original
# LLaVA in it, lmms-eval is among the file's packages.
set -eu
cd "$(dirname "$0")/../.."
name=$1
python=${PYTHON:-python3.11}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || {
    echo "test-hosts: $python is not Python 3.11, which LLaVA's pins were tested with; say where one is:" \
        "make test-hosts PYTHON=/path/to/python3.11" >&2
    exit 2
}
folder=.venv-hosts/$name
pip="$folder/bin/python -m pip --disable-pip-version-check"
$folder/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$folder"
extras=
case "$name" in
transformers-*)
    $pip install --quiet -r "tests/hosts/$name.txt"
    $pip install --quiet --no-deps llava-torch==1.2.2.post1 ;;
lmms-eval) # the list is whole, and one package's wishes (see there) can't be met
    $pip install --quiet --no-deps -r "tests/hosts/$name.txt"
    extras='[eval]' ;;
esac
# As a user of this host installs us: with dependencies, and none of his versions may change.
$pip freeze --exclude clipmoe-vlm >"$folder/before.txt"
$pip install --quiet -e ".$extras"
$pip freeze --exclude clipmoe-vlm | diff "$folder/before.txt" - || {
    echo "test-hosts: installing this package changed the host's versions (above)" >&2
    exit 1
}
# What DeepSpeed would compile in its first run; that of LLaVA's pins does not run without a GPU.
[ "$name" != transformers-4.37 ] || "$folder/bin/python" -m train_vlm.build_ops
touch "$folder/.ready"
