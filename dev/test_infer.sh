#!/usr/bin/env bash
# Inference as a program: what it reads and writes, where it stops, what it leaves behind. Runs ./infer_goldfinch (or the
# program named as the first argument) and ./train_goldfinch beside it, on a tiny model in a temporary folder.
# Closing line: N passed, N failed.
set -u
export LC_ALL=C OMP_NUM_THREADS=1
program=$(realpath "${1:-./infer_goldfinch}")
trainer=$(dirname "$program")/train_goldfinch
tmp=$(mktemp -d "${TMPDIR:-/tmp}/goldfinch_infer.XXXXXX")
head -c 9000 "${BASH_SOURCE[0]}" >"$tmp/text"; text=$tmp/text      # this script is the training text too
trap '[ $BASHPID = $$ ] && rm -rf "$tmp"' EXIT
cd "$tmp" || exit 1
passed=0 failed=0
check() {                                               # check DESCRIPTION CODE: counts, and shows the last output if CODE is not 0
    if [ "$2" = 0 ]; then passed=$((passed + 1)); echo "PASS $1"
    else failed=$((failed + 1)); echo "FAIL $1"; sed 's/^/     | /' out.txt err.txt 2>/dev/null | cut -c1-200 | tail -n 12; fi
}
infer() { "$program" "$@" >out.txt 2>err.txt; }
declined() {                                            # declined CODE PATTERN FLAGS...: one line on stderr with PATTERN in it
    infer "${@:3}"; local code=$?
    [ $code = "$1" ] && [ "$(wc -l <err.txt)" = 1 ] && grep -qE -e "$2" err.txt
    check "exit $1, \"$2\"" $?
}
leftovers() { ls -- *.tmp */*.tmp 2>/dev/null | grep -q .; }

tiny="--model.n_layer 3 --model.n_embd 64 --model.ctx_len 32 --model.vocab_size 264 --model.kv_cache_compression_ratio 8
      --train.micro_bsz 2 --train.warmup_steps 3 --train.my_exit_tokens 1000000 --train.val_every 0 --train.lr_init 2e-3
      --train.sample_every -1 --train.data_type utf-8 --train.data_file $text"
"$trainer" $tiny --train.max_steps 20 --train.out out >out.txt 2>err.txt; check "a model to run" $?
model=out/model_000020.safetensors

echo "-- options hold for the type that computes with them"
for flag in -t --top-p --presence --frequency --penalty-decay; do
    declined 2 "$flag: expected 0 or a size of at least 1.17549e-38, .* found \"1e-39\"" -p a $flag 1e-39
done
declined 2 '-t: expected .*, found "1e-400"' -p a -t 1e-400
declined 2 '-t: expected .*, found "nan"' -p a -t nan
declined 2 '-s: expected .*, found "9223372036854775808"' -p a -s 9223372036854775808
infer -p "the " -n 20 -t 1.2e-38 --top-p 1 --top-k 0; check "-t 1.2e-38, the smallest" $?
cp out.txt smallest.txt; infer -p "the " -n 20 -t 0; cmp -s out.txt smallest.txt; check "is as good as 0" $?

echo "-- a state"
infer -p "the " -n 0 --save-state good.st; check "is saved" $?
cp good.st before.st
head -c 2000000 /dev/zero | tr '\0' a >long.txt
begin=$SECONDS; declined 1 'nowhere/x.st: could not be written: No such file' -f long.txt -n 0 --save-state nowhere/x.st
[ $((SECONDS - begin)) -lt 10 ]; check "before a long prompt is read" $?
mkdir folder; declined 2 'folder: expected a file, found a folder' -p a --save-state folder
( ulimit -f 8; trap '' XFSZ; infer -p "the " -n 0 --save-state good.st; echo $? >code.txt )
[ "$(cat code.txt)" = 1 ] && grep -q 'good.st: could not be written: File too large' err.txt && cmp -s good.st before.st && ! leftovers
check "a save that fails keeps the state that was there, and leaves nothing" $?
infer nowhere.safetensors -p a --save-state new.st; [ ! -e new.st ] && ! leftovers; check "nor does a run that fails otherwise" $?

at=$((8 + $(od -A n -t u8 -N 8 good.st) + $(grep -aoE '"ids":[^}]*' good.st | grep -oE 'offsets":\[[0-9]+' | grep -oE '[0-9]+$')))
for id in '\377\377\377\177=2147483647' '\377\377\377\377=-1' '\010\001\000\000=264'; do
    cp good.st bad.st && printf "${id%=*}" | dd of=bad.st bs=1 seek=$((at + 4)) conv=notrunc status=none
    declined 2 "bad.st: ids\[1\]: expected 0 to 263, found ${id#*=}\$" --load-state bad.st -n 1
done

echo "-- standard output"
full() { "$program" "${@:2}" >/dev/full 2>err.txt; [ $? = 1 ] && [ "$(grep -c 'stdout: ' err.txt)" = 1 ]; check "to a full disk: $1" $?; }
full "a score" --score "$text" --window 64
full "-h" -h
full "the text" -p "the " -n 20
full "--cache-table" --cache-table

echo "-- lines"
printf '\xef\xbb\xbfone\r\ntwo\r\n' >marked.txt; printf 'one\ntwo\n' >plain.txt
infer -i -n 5 -s 3 <plain.txt; cp out.txt want.txt
infer -i -n 5 -s 3 <marked.txt; cmp -s out.txt want.txt; check "a byte order mark and carriage returns make no difference" $?
[ "$(grep -c 'stdin: left out: a byte order mark, and carriage returns at the lines. ends' err.txt)" = 1 ]; check "and are told of once" $?

echo "-- a prompt that ends inside a character"
yes 'é ü ß ö' | head -n 600 >umlauts.txt
"$trainer" $tiny --train.data_file umlauts.txt --train.max_steps 150 --train.out umlauts >out.txt 2>err.txt
umlauts=umlauts/model_000150.safetensors
infer $umlauts -n 1 -t 0 -p "$(printf 'é ü \xc3')"; [ "$(od -A n -t x1 out.txt | tr -d ' \n')" = c39f0a ]
check "its last byte completes it" $?
infer $umlauts -n 0 -p "$(printf 'é ü \xc3')" --save-state half.st && [ ! -s out.txt ]; check "with nothing written there is nothing to replace" $?
infer $umlauts -n 1 -t 0 --load-state half.st; [ "$(od -A n -t x1 out.txt | tr -d ' \n')" = c39f0a ]
check "so it is from a saved state" $?
infer $umlauts -n 1 -t 0 -p "$(printf 'é ü ß\xe4')" ; ! grep -q "$(printf '\xef\xbf\xbd.')" out.txt # alone: half a character of its own
check "what the prompt broke off is not replaced" $?

echo "-- Ctrl-C"
stopped() {                                             # stopped PATTERN FLAGS...: SIGINT after two seconds ends it within two
    rm -f out.txt; "$program" "${@:2}" >out.txt 2>err.txt & local pid=$!
    sleep 2; kill -INT $pid; local begin=$SECONDS; wait $pid
    [ $? = 130 ] && [ $((SECONDS - begin)) -le 4 ] && grep -qE "$1" err.txt
}
stopped 'stopped by a signal: [0-9]+ of 1999999 predictions' --score long.txt && grep -q ' loss ' out.txt
check "in a score: the part that is done is told" $?
cp before.st good.st; stopped 'stopped by a signal: [0-9]+ of the prompt.s 2000000 tokens were read' -f long.txt --save-state good.st
check "in a prompt" $?
cmp -s good.st before.st && ! leftovers; check "the state that was there stays" $?

echo "-- a score"
printf a >one.txt; declined 2 'one.txt: tokens: expected 2 or more, found 1' --score one.txt
printf ab >two.txt; infer --score two.txt && grep -q 'two.txt: 2 tokens' out.txt; check "of two tokens" $?
head -c 6000 "$text" >part.txt; infer --score part.txt; cut -d'|' -f2 out.txt >want.txt
infer --score part.txt --kv full; cut -d'|' -f2 out.txt | cmp -s - want.txt; check "is the same with --kv full" $?
echo "-- keys and values at hand"
head -c 200 "$text" >start.txt; infer -f start.txt -n 30 -t 0; cp out.txt want.txt
infer -f start.txt -n 30 -t 0 --kv-window 16; cmp -s out.txt want.txt; check "16 of 230: the same text" $?
declined 2 '--kv-window: expected no --kv full beside it' -p a --kv full --kv-window 16
if command -v script >/dev/null; then
    for ((i = 0; i < 100; i++)); do cat part.txt; done >long.txt        # 3 s are enough: the line comes after one
    script -qec "timeout --foreground -s INT 3 '$program' --score long.txt --window 8" /dev/null >out.txt 2>&1
    grep -aqE 'score: [0-9]+ of 53[0-9]+ tokens, [0-9]+:[0-9]+ left' out.txt
    check "a terminal sees how long it takes" $?
fi

echo "-- weights in 8 bits"
declined 2 '--weights: expected bf16 or int8, found "fp8"' -p a --weights fp8
for twins in 0 1; do CUDA_ON_CPU_TWINS=$twins infer $model -p "the " -n 40 -t 0 --weights int8 && mv out.txt twins$twins.txt; done
cmp -s twins0.txt twins1.txt && [ -s twins0.txt ]; check "go on with a prompt, the same by kernels and by their twins" $?
loss() { grep -oE 'loss [0-9.]+' out.txt | head -n 1 | cut -c6-; }
infer $model --score part.txt; whole=$(loss); infer $model --score part.txt --weights int8; eighth=$(loss)
awk -v a="$whole" -v b="$eighth" 'BEGIN { exit !(a > 0 && b > 0 && a != b && a - b < 0.01 && b - a < 0.01) }'
check "a score is within 0.01 of the one in full ($whole, $eighth)" $?
echo '{"context": "the ", "continuation": "cat"}' >asked.jsonl
infer $model --requests asked.jsonl --weights int8 && grep -q '"logprob": -' out.txt; check "requests are answered" $?
infer $model -p "the " -n 20 -s 3 --weights int8 --save-state int8.st && cp out.txt want.txt
infer $model -n 20 -s 3 --weights int8 --load-state int8.st && cmp -s out.txt want.txt; check "a state goes on with the same tokens" $?
declined 2 'int8.st: metadata, field weights: expected bf16, found int8: go on with --weights int8, or' $model --load-state int8.st -n 1
declined 2 'good.st: metadata, field weights: expected int8, found bf16: go on with --weights bf16, or' $model --load-state good.st -n 1 --weights int8
sed 's/"weights":"bf16"/"weightz":"bf16"/' good.st >old.st
! cmp -s good.st old.st && infer $model --load-state old.st -n 1; check "a state without the field was made in full" $?

echo "-- the newest checkpoint, while a trainer saves after every step"
rm -rf out
"$trainer" $tiny --train.save_every 1 --train.max_steps 100000 --train.out out >trainer.txt 2>&1 & pid=$!
until ls out/model_*.safetensors >/dev/null 2>&1 || ! kill -0 $pid; do sleep 0.1; done
bad=0
for ((i = 0; i < 40; i++)); do infer -p a -n 1 || { bad=$((bad + 1)); tail -n 1 err.txt >>bad.txt; }; done
kill -9 $pid; wait $pid 2>/dev/null; cp bad.txt err.txt 2>/dev/null
[ $bad = 0 ]; check "is found 40 times ($bad failures)" $?

echo "$passed passed, $failed failed"
[ $failed = 0 ]
