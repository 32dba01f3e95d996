"""The texts of the benchmark folder: what runs on the device, what brings it there, and what a person reads."""

from __future__ import annotations

_RUN = """\
#!/bin/sh
# On the device, in this folder: is every answer the simulator's, and how long does one take?
# Environment: BENCHMARK (program, ./benchmark), THREADS (2), LOOPS (100).
cd "$(dirname "$0")" || exit 1
benchmark=${BENCHMARK:-./benchmark} threads=${THREADS:-2} loops=${LOOPS:-100} different=0
export LD_LIBRARY_PATH="$PWD/lib:$LD_LIBRARY_PATH"
rm -rf dump log && mkdir log || exit 1
for input in inputs/*.bin; do
  sample=$(basename "$input" .bin)
  settings='"dump_mode": 0, "input_output": 2, "kernels": []'
  printf '{"common_dump_settings": {%s, "path": "%s", "net_name": "%s"}}' "$settings" "$PWD/dump" "$sample" > dump.json
  if MINDSPORE_DUMP_CONFIG="$PWD/dump.json" "$benchmark" --modelFile=@MODEL@ --inDataFile="$input" \\
    --benchmarkDataFile="expected/$sample.txt" --accuracyThreshold=@THRESHOLD@ --numThreads="$threads" \\
    > "log/$sample.txt" 2>&1
  then echo "$sample: as simulated"
  else echo "$sample: NOT as simulated, see log/$sample.txt"; different=$((different + 1))
  fi
done
"$benchmark" --modelFile=@MODEL@ --loopCount="$loops" --numThreads="$threads" || exit 1
echo "$different samples are not as simulated"
[ "$different" -eq 0 ]
"""

_PHONE = """\
#!/bin/sh
# sh phone.sh PACKAGE: run the benchmark on the phone adb is connected to.
# PACKAGE: MindSpore Lite for android-aarch64, unpacked.
package=${1:?give the unpacked package of MindSpore Lite for android-aarch64}
target=/data/local/tmp/msqkd/@NAME@
set -e
find "$package/tools/benchmark/benchmark" "$package/runtime/lib" > /dev/null
libraries=$(cd "$package" && pwd)/runtime
program=$(cd "$package" && pwd)/tools/benchmark/benchmark
cd "$(dirname "$0")"
adb shell "rm -rf $target && mkdir -p $target/lib"
adb push @MODEL@ inputs expected run.sh "$program" "$target/"
find "$libraries" -name '*.so*' ! -type d -exec adb push {} "$target/lib/" ';'
status=0
adb shell "cd $target && chmod +x benchmark && THREADS=${THREADS:-2} LOOPS=${LOOPS:-100} sh run.sh" || status=$?
rm -rf dump
adb pull "$target/dump" . || echo "no dump: this benchmark was built without it"
exit $status
"""

_BOARD = """\
#!/bin/sh
# sh board.sh HOST PACKAGE: run the benchmark on a board that ssh reaches.
# PACKAGE: MindSpore Lite for linux-aarch64, unpacked on this computer.
host=${1:?give the board, as ssh knows it} package=${2:?give the unpacked package of MindSpore Lite for linux-aarch64}
target=msqkd_@NAME@
set -e
find "$package/tools/benchmark/benchmark" "$package/runtime/lib" > /dev/null
libraries=$(cd "$package" && pwd)/runtime
program=$(cd "$package" && pwd)/tools/benchmark/benchmark
cd "$(dirname "$0")"
ssh "$host" "rm -rf $target && mkdir -p $target/lib"
scp -r @MODEL@ inputs expected run.sh "$program" "$host:$target/"
find "$libraries" -name '*.so*' ! -type d -exec scp {} "$host:$target/lib/" ';'
status=0
ssh "$host" "cd $target && chmod +x benchmark && THREADS=${THREADS:-2} LOOPS=${LOOPS:-100} sh run.sh" || status=$?
rm -rf dump
scp -r "$host:$target/dump" . || echo "no dump: this benchmark was built without it"
exit $status
"""

_README = """\
Does the device answer as the simulator says?
=============================================

model         @MODEL@, int8
inputs/       @COUNT@ samples, float32, NHWC
expected/     what the simulator answers, as --benchmarkDataFile takes it (arithmetic of arm64)
run.sh        runs on the device
phone.sh      brings everything to a phone with adb, runs it and fetches the dumps
board.sh      the same for a board, with ssh

Needed: a package of MindSpore Lite for the device (android-aarch64 or linux-aarch64) with tools/benchmark/benchmark.

Phone:              sh phone.sh PACKAGE
Board, over ssh:    sh board.sh HOST PACKAGE
On the board:       BENCHMARK=/PACKAGE/tools/benchmark/benchmark LD_LIBRARY_PATH=/PACKAGE/runtime/lib sh run.sh

By hand, on a phone:

  adb shell mkdir -p /data/local/tmp/msqkd/@NAME@
  adb push @MODEL@ inputs expected PACKAGE/tools/benchmark/benchmark /data/local/tmp/msqkd/@NAME@/
  adb push PACKAGE/runtime/lib /data/local/tmp/msqkd/@NAME@/
  adb shell "cd /data/local/tmp/msqkd/@NAME@ && chmod +x benchmark && LD_LIBRARY_PATH=./lib ./benchmark \\
    --modelFile=@MODEL@ --inDataFile=inputs/00000.bin --benchmarkDataFile=expected/00000.txt \\
    --accuracyThreshold=@THRESHOLD@ --numThreads=2"
  adb shell "cd /data/local/tmp/msqkd/@NAME@ && LD_LIBRARY_PATH=./lib ./benchmark \\
    --modelFile=@MODEL@ --loopCount=100 --numThreads=2"

The first benchmark command ends with "Mean bias of all nodes/tensors: 0%" and exit code 0 where the answer is the
simulator's; the second prints the time one inference takes.
@EXACT@

Layer by layer: the scripts have every node's output dumped, and fetch the folder dump/. Then, where msqkd is
installed,

  python tools/export_lite.py --check THIS_FOLDER dump

compares every value with the simulator's. Expected: 0 of them differ.
"""

_EXACT = "Every node computes in int8, so the threshold is 0: one step of one output would already be refused."
_NOT_EXACT = "Some nodes compute in float, where the device may sum in another order: hence the threshold, in percent."


def scripts(model: str, threshold: float) -> dict[str, str]:
    """The shell scripts by file name.

    Args:
        model: name of the ``.ms`` file.
        threshold: for ``--accuracyThreshold``, in percent.
    """
    texts = {"run.sh": _RUN, "phone.sh": _PHONE, "board.sh": _BOARD}
    return {name: _filled(text, model, threshold) for name, text in texts.items()}


def readme(model: str, samples: int, threshold: float) -> str:
    """The README of a folder with so many samples."""
    text = _README.replace("@EXACT@", _NOT_EXACT if threshold else _EXACT).replace("@COUNT@", str(samples))
    return _filled(text, model, threshold)


def _filled(text: str, model: str, threshold: float) -> str:
    name = model[: -len(".ms")] if model.endswith(".ms") else model
    values = {"@MODEL@": model, "@NAME@": name, "@THRESHOLD@": f"{threshold:g}"}
    for key, value in values.items():
        text = text.replace(key, value)
    return text
