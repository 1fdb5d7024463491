#!/usr/bin/env bash
# Several ranks as processes of the CPU build: the same bits as one rank with accumulation, resume on other numbers of
# ranks, launchers, deaths. Runs ./train_goldfinch (or the program named as the first argument) on tiny models in a
# temporary folder, and ./test_goldfinch beside it on the training tables; `short` as the second argument: a few runs.
# Closing line: N passed, N failed.
set -u
export LC_ALL=C
program=$(realpath "${1:-./train_goldfinch}")
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
tmp=$(mktemp -d "${TMPDIR:-/tmp}/goldfinch_ranks.XXXXXX")
trap '[ $BASHPID = $$ ] && rm -rf "$tmp"' EXIT
# The training text. Of so many bytes the sampler sees nearly all: it says nothing of that on stderr.
head -c 20000 "$here/test.sh" >"$tmp/text"; text=$tmp/text
cd "$tmp" || exit 1
passed=0 failed=0
export OMP_NUM_THREADS=1 CUDA_ON_CPU_DEVICES=4
RANDOM=1

tiny="--model.n_layer 3 --model.n_embd 64 --model.ctx_len 32 --model.vocab_size 264 --model.kv_cache_compression_ratio 8
      --train.warmup_steps 3 --train.my_exit_tokens 1000000 --train.lr_init 2e-3 --train.sample_every -1 --train.val_batches 3
      --train.data_type utf-8 --train.data_file $text"

check() {                                               # check DESCRIPTION CODE: shows the last output if CODE is not 0
    if [ "$2" = 0 ]; then passed=$((passed + 1)); echo "PASS $1"
    else failed=$((failed + 1)); echo "FAIL $1"; sed 's/^/     | /' out.txt err.txt 2>/dev/null | cut -c1-200 | tail -n 6; fi
}
train() { timeout 100 "$program" $tiny "$@" >out.txt 2>err.txt; }
good() { train "${@:2}"; check "$1" $?; }               # good DESCRIPTION FLAGS...: exits 0
refused() {                                             # refused CODE PATTERN FLAGS...: one line on stderr with PATTERN in it
    train "${@:3}"; local code=$?
    [ $code = "$1" ] && [ "$(wc -l <err.txt)" = 1 ] && grep -qE -e "$2" err.txt
    check "exit $1, \"$2\"" $?
}
hashes() { local f; for f in "$1"/*.safetensors; do head -c 200000 "$f" | grep -aoE '"hash":"[0-9a-f]{16}"' | head -n 1; done; }
same_run() {                                            # same_run FOLDER FOLDER: log (but for times), all tensors' bytes
    cmp -s <(cut -d, -f1-6 "$1/log.csv") <(cut -d, -f1-6 "$2/log.csv") || return 1
    [ -n "$(hashes "$1")" ] && [ "$(hashes "$1")" = "$(hashes "$2")" ]
}
newest() { local f; f=$(ls "$1" 2>/dev/null | grep -E '^model_[0-9]+\.safetensors$' | tail -n 1); f=${f#model_}; echo "${f%.safetensors}"; }
still_there() {                                         # still_there PID...: one of them is a process, not only a dead one's entry
    local p; for p; do [ -e /proc/$p ] && ! grep -qs '^State:.Z' /proc/$p/status && return 0; done; return 1
}

if [ "${2:-}" = short ]; then                           # for programs that a sanitizer slows down
    run="--train.micro_bsz 1 --train.val_every 2"
    for flags in "" "--train.grad_cp 2" "--train.accumulate_grad_batches 2"; do
        good "3 ranks $flags" $run $flags --train.max_steps 2 --train.devices 3 --train.out a
        good "resumed on 2" --train.max_steps 4 --train.resume 1 --train.devices 2 --train.out a
        good "resumed on one" --train.max_steps 5 --train.resume 1 --train.out a
    done
    refused 3 'not finite .* of rank 0; .*; last good checkpoint: n/model_000001' --train.devices 2 --train.micro_bsz 1 \
        --train.save_every 1 --train.lr_init 1e30 --train.warmup_steps 0 --train.out n
    echo "$passed passed, $failed failed"
    exit $((failed > 0))
fi

echo "-- one batch, split among ranks and micro-batches"
for n in 2 3 4; do                                      # one: make test
    "$(dirname "$program")/test_goldfinch" --ranks $n "$here"/golden/train_*.txt >out.txt 2>err.txt
    check "training tables on $n ranks" $?
done
run="--train.max_steps 6 --train.val_every 3 --train.save_every 0"
for n in 2 3 4; do
    good "$n ranks" $run --train.micro_bsz $((12 / n)) --train.devices $n --train.out r$n
    good "one rank, $n micro-batches" $run --train.micro_bsz $((12 / n)) --train.accumulate_grad_batches $n --train.out a$n
    same_run r$n a$n; check "the same losses, norms, validation and tensors, bit for bit" $?
done
good "12 sequences on one rank" $run --train.micro_bsz 12 --train.out a1
good "2 ranks, 3 micro-batches each" $run --train.micro_bsz 2 --train.accumulate_grad_batches 3 --train.devices 2 --train.out r23
for d in r2 r3 r4 r23; do                               # sums in another order: 1e-6 of a loss, and what comes of it in 6 steps
    paste -d, a1/log.csv $d/log.csv | awk -F, 'NR > 1 { d = ($3 - $12) / $3; n = ($5 - $14) / $5; if ($2 != $11 || d * d > 1e-7 || n * n > 1e-4) exit 1 }'
    check "$d has the losses of one rank to 3e-4, the norms to 1e-2" $?
done
good "4 ranks again" $run --train.micro_bsz 3 --train.devices 4 --train.out again
same_run r4 again; check "the same bits" $?
for cp in 1 2; do
    good "2 ranks, grad_cp $cp" $run --train.micro_bsz 6 --train.devices 2 --train.grad_cp $cp --train.out cp$cp
    same_run r2 cp$cp; check "the same bits" $?
done
good "2 ranks, sums beside the backward pass" $run --train.micro_bsz 6 --train.devices 2 --train.overlap_comm 1 --train.out early
same_run r2 early; check "the same bits" $?
good "all of this machine" --train.devices -1 --train.max_steps 1 --train.micro_bsz 1 --train.out all
grep -q 'one of 4 GPUs' out.txt; check "are 4 here" $?

echo "-- masks"
bytes() { local i; for ((i = 0; i < $2; i++)); do printf "\\x$(printf %02x $(($1 >> 8 * i & 255)))"; done; }
index() {                                               # index PREFIX: PREFIX.idx, one document of u8
    local n; n=$(wc -c <"$1.bin")
    { printf 'MMIDIDX\0\0'; bytes 1 8; bytes 1 1; bytes 1 8; bytes 2 8; bytes "$n" 4; bytes 0 8; bytes 0 8; bytes 1 8; } >"$1.idx"
}
cp "$text" bytes.bin
tr 'a-z' '\1' <bytes.bin | tr -c '\1' '\0' >letters.bin # letters count, here more, there less
tr '\0-\377' '\1' <bytes.bin >ones.bin
for name in bytes letters ones; do index $name; done
masked="$run --train.data_type binidx --train.data_file bytes --train.mask_file"
good "2 ranks" $masked letters --train.micro_bsz 3 --train.devices 2 --train.out m2
good "one rank, 2 micro-batches" $masked letters --train.micro_bsz 3 --train.accumulate_grad_batches 2 --train.out ma2
same_run m2 ma2; check "the same bits" $?
good "one batch of both" $masked letters --train.micro_bsz 6 --train.out m1
paste -d, m1/log.csv m2/log.csv | awk -F, 'NR > 1 { d = ($3 - $12) / $3; n = ($5 - $14) / $5; if ($2 != $11 || d * d > 1e-7 || n * n > 1e-4) exit 1 }'
check "has the loss of the mean over all that counts, to 3e-4" $?
good "all count" $masked ones --train.micro_bsz 3 --train.devices 2 --train.out ones
good "no mask" ${masked% *} --train.micro_bsz 3 --train.devices 2 --train.out none
cmp -s <(cut -d, -f1-6 ones/log.csv) <(cut -d, -f1-6 none/log.csv) && ! same_run ones m2; check "the same losses and norms, bit for bit" $?
good "3 steps" $masked letters --train.micro_bsz 3 --train.devices 2 --train.max_steps 3 --train.out mr
good "3 more on one rank" $masked letters --train.resume 1 --train.max_steps 6 --train.out mr
same_run m2 mr; check "the same bits" $?
refused 2 'bytes.bin, ones: expected the data that this run began with' $masked ones --train.resume 1 --train.max_steps 7 --train.out mr

echo "-- resume on another number of ranks"
good "8 steps on one rank" --train.micro_bsz 6 --train.accumulate_grad_batches 2 --train.max_steps 8 --train.val_every 0 --train.out one
good "3 steps on 2 ranks" --train.micro_bsz 6 --train.devices 2 --train.max_steps 3 --train.val_every 0 --train.out moves
good "3 more on one rank" --train.resume 1 --train.max_steps 6 --train.out moves
grep -q '2 GPUs before, 1 now: accumulate_grad_batches 2 keeps the batch of 12 sequences' out.txt; check "which keeps the batch" $?
cmp -s <(head -n 7 one/log.csv | cut -d, -f1-6) <(cut -d, -f1-6 moves/log.csv); check "and the losses, bit for bit" $?
good "2 more on 3 ranks" --train.resume 1 --train.max_steps 8 --train.devices 3 --train.micro_bsz 4 \
    --train.accumulate_grad_batches 1 --train.out moves
paste -d, one/log.csv moves/log.csv | awk -F, 'NR > 1 { d = ($3 - $12) / $3; if ($2 != $11 || $6 != $15 || d * d > 1e-7) exit 1 } END { exit NR != 9 }'
check "the same samples and rates, the losses to 3e-4" $?

echo "-- launchers"
launch() {                                              # launch N NAMES FLAGS...: N processes, the variables NAMES hold rank and size
    local n=$1 names=($2) i pids=() bad=0; shift 2
    for ((i = 0; i < n; i++)); do
        env "${names[0]}=$i" "${names[1]}=$n" "${names[2]}=$i" MASTER_PORT=$port timeout 100 "$program" $tiny "$@" >out$i.txt 2>err$i.txt & pids+=($!)
    done
    for i in ${pids[@]}; do wait $i || bad=$?; done
    cat out?.txt >out.txt; cat err?.txt >err.txt; rm out?.txt err?.txt
    return $bad
}
port=$((20000 + $$ % 20000))
for names in "RANK WORLD_SIZE LOCAL_RANK" "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK" \
             "SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID" "PMI_RANK PMI_SIZE MPI_LOCALRANKID"; do
    port=$((port + 2))
    launch 2 "$names" $run --train.micro_bsz 6 --train.out l; check "two processes, ${names%% *}" $?
    same_run l r2; check "the bits of --train.devices 2" $?
    [ "$(grep -c '^step  *1 ' out.txt)" = 1 ] && [ ! -s err.txt ]; check "one of them prints" $?
done
launch 2 "RANK WORLD_SIZE LOCAL_RANK" $run --train.devices 3 --train.out l; [ $? = 2 ] &&
    grep -q 'devices 3, num_nodes 1: expected as many as torchrun started, 2' err.txt; check "devices 3 where 2 were started" $?
names="RANK WORLD_SIZE LOCAL_RANK"
RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 GOLDFINCH_PATIENCE=1 MASTER_PORT=$port timeout 60 "$program" $tiny --train.out l >out.txt 2>err.txt
[ $? = 1 ] && grep -q 'rank 1: rank 0 does not answer at 127.0.0.1' err.txt; check "rank 0 never comes" $?
RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 GOLDFINCH_PATIENCE=1 MASTER_PORT=$port timeout 60 "$program" $tiny --train.out l >out.txt 2>err.txt
[ $? = 1 ] && grep -q 'rank 0: 1 of 2 ranks have not come within 3 s' err.txt; check "rank 1 never comes" $?
RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_PORT=$port timeout 60 "$program" $tiny --train.micro_bsz 3 --train.out l >out.txt 2>/dev/null &
RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_PORT=$port timeout 60 "$program" $tiny --train.out l >out.txt 2>err.txt
[ $? = 2 ] && grep -q 'rank 1 was started with other settings' err.txt; check "other settings" $?
wait

echo "-- refusals"
refused 2 'devices 6: found 4 here; --train.devices 4 --train.accumulate_grad_batches 3 is the same batch' \
    --train.devices 6 --train.accumulate_grad_batches 2
refused 2 'num_nodes 2: expected mpirun, torchrun or srun' --train.num_nodes 2
refused 2 'devices: expected -1 or 1 or more, found 0' --train.devices 0
refused 2 'rank 0: nowhere: No such file' --train.devices 2 --train.data_file nowhere
printf 'train:\n  devices: 2\n  num_nodes: 1\n' >two.yaml
good "devices in a config" -c two.yaml --train.max_steps 1 --train.micro_bsz 1 --train.out y; grep -q 'one of 2 GPUs' out.txt; check "are used" $?
CUDA_ON_CPU_DEVICES=2 launch 3 "RANK WORLD_SIZE LOCAL_RANK" --train.micro_bsz 1 --train.out l; [ $? = 2 ] &&
    [ "$(cat err.txt | wc -l)" = 1 ] && grep -q "rank 2: number 2 of this machine's ranks finds 2 GPUs" err.txt
check "a rank that cannot start: one line, all end" $?
refused 3 'rank 0: step 2: not finite .*: first in [a-z].* of rank 0; .*; last good checkpoint: n/model_000001' --train.devices 2 \
    --train.micro_bsz 2 --train.save_every 1 --train.lr_init 1e30 --train.warmup_steps 0 --train.out n

echo "-- deaths"
exec 3>&2 2>/dev/null                                   # bash tells of each
start() {                                               # start FOLDER FLAGS...: a run of 3 ranks in the background, $pid; $pids: all
    rm -f out.txt err.txt; touch out.txt
    "$program" $tiny --train.devices 3 --train.micro_bsz 1 --train.val_every 0 --train.max_steps 100000 --train.out "$@" >out.txt 2>err.txt & pid=$!
    local i; for ((i = 0; i < 3000; i++)); do grep -qs '^step' out.txt && break; kill -0 $pid 2>/dev/null || break; sleep 0.01; done
    pids=($pid $(pgrep -P $pid))
}
ended() {                                               # ended SECONDS: no process of the run is left within that time
    local i; for ((i = 0; i < $1 * 20; i++)); do still_there ${pids[@]} || return 0; sleep 0.05; done
    kill -9 ${pids[@]}; return 1
}
whole=0 tries=${KILLS:-9} odd=
for ((i = 0; i < tries; i++)); do
    start k --train.save_every 1 --train.resume 1
    sleep "0.$(printf %03d $((RANDOM % 300)))"
    kill -9 ${pids[$((i % 3))]}; ended 30 || odd+="kill $i: a process was left; "
    wait $pid; code=$?
    if [ $((i % 3)) = 0 ]; then lines=2 expected=137; else lines=1 expected=1; fi       # rank 0 killed: the two others each say so
    [ $code = $expected ] && [ "$(wc -l <err.txt)" -le $lines ] && [ -s err.txt ] || odd+="kill $i: exit $code, $(cat err.txt); "
    step=$(newest k); [ -n "$step" ] && [ -e "k/state_$step.safetensors" ] && whole=$((whole + 1))
done
echo "$odd" >>err.txt
[ -z "$odd" ]; check "$tries kills of one rank: the others ended, with one line and exit code 1" $?
[ $whole = $tries ]; check "and left a whole checkpoint" $?
last=$((10#$(newest k) + 2))
good "the run goes on to step $last" --train.devices 3 --train.micro_bsz 1 --train.val_every 0 --train.resume 1 --train.max_steps $last --train.out k
good "the same without kills" --train.devices 3 --train.micro_bsz 1 --train.val_every 0 --train.save_every 0 --train.max_steps $last --train.out kk
same_run k kk; check "the same bits" $?
for victim in 0 2; do
    GOLDFINCH_PATIENCE=3 start s --train.save_every 0
    kill -STOP ${pids[$victim]}; ended 12; check "rank $victim stopped (SIGSTOP): no process is left" $?
    wait $pid 2>/dev/null; [ $? != 0 ]; check "not a success" $?
    grep -q "rank $victim gives no sign of life; this run ends" err.txt; check "one line says who" $?
done
set -m                                                  # a run with a process group of its own, as in a terminal
start i --train.save_every 0; set +m
kill -INT -- -$pid; wait $pid; check "Ctrl-C, to all ranks at once: exit 0" $?
ended 5; check "no process is left" $?
grep -q 'stopped by a signal' out.txt && [ "$(ls i/model_*.safetensors | wc -l)" = 1 ] &&
    [ "$(newest i)" = "$(printf %06d "$(tail -n 1 i/log.csv | cut -d, -f1)")" ] && [ ! -s err.txt ]
check "one save, of the last step in the log" $?
start j --train.save_every 0; kill -TERM $pid; wait $pid; check "SIGTERM to rank 0 alone: exit 0" $?
ended 5; check "no process is left" $?
[ "$(newest j)" = "$(printf %06d "$(tail -n 1 j/log.csv | cut -d, -f1)")" ]; check "saved" $?
exec 2>&3

echo "$passed passed, $failed failed"
[ $failed = 0 ]
