#!/usr/bin/env bash
# What needs processes: resume, kills, signals, damaged files, bad flags. Runs ./train_goldfinch (or the program named as
# the first argument), and ./infer_goldfinch beside it, on tiny models in a temporary folder; needs no more than bash, coreutils, grep, sed and awk.
# Closing line: N passed, N failed.
set -u
export LC_ALL=C
program=$(realpath "${1:-./train_goldfinch}")
tmp=$(mktemp -d "${TMPDIR:-/tmp}/goldfinch_test.XXXXXX")
trap '[ $BASHPID = $$ ] && rm -rf "$tmp"' EXIT           # not where a child is killed before it becomes the program
head -c 20000 "${BASH_SOURCE[0]}" >"$tmp/text"; text=$tmp/text     # this script is the training text too
cd "$tmp" || exit 1
passed=0 failed=0
export OMP_NUM_THREADS=1                                # models this small gain nothing from more
RANDOM=1

tiny="--model.n_layer 3 --model.n_embd 64 --model.ctx_len 32 --model.vocab_size 264 --model.kv_cache_compression_ratio 8
      --train.micro_bsz 2 --train.warmup_steps 3 --train.my_exit_tokens 1000000 --train.val_batches 2 --train.lr_init 2e-3
      --train.sample_every -1"
utf8="--train.data_type utf-8 --train.data_file $text"

check() {                                               # check DESCRIPTION CODE: counts, and shows the last output if CODE is not 0
    if [ "$2" = 0 ]; then passed=$((passed + 1)); echo "PASS $1"
    else failed=$((failed + 1)); echo "FAIL $1"; sed 's/^/     | /' out.txt err.txt 2>/dev/null | cut -c1-200 | tail -n 12; fi
}
train() { "$program" $tiny "$@" >out.txt 2>err.txt; }   # train FLAGS...
good() { train $utf8 "${@:2}"; check "$1" $?; }         # good DESCRIPTION FLAGS...: exits 0
refused() {                                             # refused CODE PATTERN FLAGS...: one line on stderr with PATTERN in it
    train "${@:3}"; local code=$?
    [ $code = "$1" ] && [ "$(wc -l <err.txt)" = 1 ] && grep -qE -e "$2" err.txt
    check "exit $1, \"$2\"" $?
}
same_run() {                                            # same_run FOLDER FOLDER: log (but for times) and checkpoints
    cmp -s <(cut -d, -f1-6 "$1/log.csv") <(cut -d, -f1-6 "$2/log.csv") || return 1
    [ "$(cd "$1" && ls ./*.safetensors)" = "$(cd "$2" && ls ./*.safetensors)" ] || return 1
    local file; for file in "$1"/*.safetensors; do cmp -s "$file" "$2/${file##*/}" || return 1; done
}
newest() { local f; f=$(ls "$1" 2>/dev/null | grep -E '^model_[0-9]+\.safetensors$' | tail -n 1); f=${f#model_}; echo "${f%.safetensors}"; }
until_newer() {                                         # until_newer FOLDER STEP PID: waits for a newer checkpoint than STEP
    local i; for ((i = 0; i < 3000; i++)); do
        [ "$(newest "$1")" != "$2" ] && return 0
        kill -0 "$3" 2>/dev/null || return 1
        sleep 0.01
    done
}
little_endian() {                                       # little_endian BYTES NUMBER...: the numbers' bytes
    local bytes=$1 n i h s=; shift
    for n; do for ((i = 0; i < bytes; i++)); do printf -v h '\\x%02x' $((n >> 8 * i & 255)); s+=$h; done; done
    printf "$s"
}
patch() { printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none; }    # patch FILE OFFSET BYTES
u64_at() { od -A n -t u8 -j "$2" -N 8 "$1" | tr -d ' '; }

echo "-- flags"
"$program" -h >out.txt 2>err.txt; check "-h" $?
[ "$(grep -c -e '^  --' out.txt)" -ge 45 ]; check "-h lists the settings" $?
refused 2 'unknown setting "--model.n_layers"' --model.n_layers 3
refused 2 'unknown setting "n_layer"' n_layer 3
refused 2 'train.lr_init: a value is missing' --train.lr_init
refused 2 'micro_bsz: expected a whole number from 1 to 65536, found "2.5"' --train.micro_bsz 2.5
refused 2 'micro_bsz: expected a whole number from 1 to 65536, found "99999999999999999999"' --train.micro_bsz 99999999999999999999
refused 2 'adam_eps: expected .*, found "1e-39"' --train.adam_eps 1e-39
refused 2 'lr_final: expected 0 or a number that a float holds .*, found "1e-39"' --train.lr_final 1e-39
refused 2 'brope.rescale: expected 0 or a number that a float holds .*, found "1e-300"' --model.brope.rescale 1e-300
refused 2 'beta1: expected a number from 0 to 0.999999, found "nan"' --train.beta1 nan
refused 2 'grad_cp: expected a whole number from 0 to 2, found "3"' --train.grad_cp 3
refused 2 'tmix: expected at most 15 letters' --model.tmix x060c2x060c2x060c2
refused 2 'n_embd: expected a whole number from 64 to 65536, a multiple of 64, found "100"' $utf8 --model.n_embd 100
refused 2 'n_layer: expected a whole number from 1 to 4096, found "0"' $utf8 --model.n_layer 0
refused 2 'dim_ffn: expected .*, a multiple of 32, found "40"' $utf8 --model.dim_ffn 40
refused 2 'head_size: expected a whole number from 64 to 64.*, found "32"' $utf8 --model.head_size 32
refused 2 'dropout: expected a number from 0 to 0, found "0.1"' $utf8 --model.dropout 0.1
refused 2 'vocab_size: expected .*, a multiple of 8, found "257"' $utf8 --model.vocab_size 257
refused 2 'vocab_size: expected 264 or more for utf-8' $utf8 --model.vocab_size 256
refused 2 'x999' $utf8 --model.tmix x999
refused 2 'lr_decay_type: expected cos, linear, exp or oneminussqrt, found "step"' $utf8 --train.lr_decay_type step
refused 2 'data_type: expected binidx or utf-8, found "json"' --train.data_type json
refused 2 'nowhere.txt: No such file' --train.data_type utf-8 --train.data_file nowhere.txt
refused 2 'nowhere.idx: No such file' --train.data_file nowhere
"$program" -c configs/L12D768ctx1024minipile.yaml --train.data_file "$text" --train.data_type utf-8 --model.n_layer 3 --model.n_embd 64 \
    --model.vocab_size 264 --model.ctx_len 32 --train.micro_bsz 16 --train.train_stage 1 --train.out batch >out.txt 2>err.txt
grep -q 'batch  *16 sequences a step, 0.25 of the paper.s 64: --train.accumulate_grad_batches 4 makes it whole' out.txt
check "a named setting's batch is compared to the paper's" $?; rm -rf batch
head -c 60 "$text" >short.txt
refused 2 'short.txt: tokens, at least 2 ctx_len \+ 1: expected 65 or more, found 60' \
    --train.data_type utf-8 --train.data_file short.txt
[ ! -e out ]; check "none of these left anything behind" $?

echo "-- what is written"
for flags in -h --print-config "$utf8 --train.max_steps 1 --train.out full"; do
    "$program" $tiny $flags >/dev/full 2>err.txt
    [ $? = 1 ] && grep -q 'stdout: could not be written: No space left' err.txt; check "${flags%% *} into a full disk: exit 1" $?
done
"$program" $tiny $utf8 --train.max_steps 1 --train.out full >&- 2>err.txt; check "a closed stdout" $?
[ "$(wc -l <full/log.csv)" = 2 ]; check "prints into no file of the run" $?
good "a run" --train.max_steps 1 --train.out limit
cp -r limit before
(ulimit -f 64; "$program" $tiny $utf8 --train.max_steps 2 --train.resume 1 --train.out limit >out.txt 2>err.txt)
[ $? = 1 ] && grep -q 'limit/model_[a-z0-9]*.safetensors: could not be written: File too large' err.txt
check "a checkpoint over ulimit -f: exit 1" $?
for file in before/*.safetensors; do cmp -s $file limit/${file##*/} || break; done
check "the one before stays" $?
[ "$(ls limit)" = "$(ls before)" ]; check "and no temporary file" $?
good "sample" --train.max_steps 1 --train.sample_every 0 --train.out sample
! LC_ALL=C.UTF-8 grep -qaxv '.*' out.txt; check "a sample is valid UTF-8" $?

echo "-- configs"
config() { "$program" "$@" --print-config >out.txt 2>err.txt; }          # config FLAGS...
says() { grep -qE -e "^ +$1: \"?$2\"?$" out.txt; }                       # says KEY VALUE: so it stands in what was printed
families="goldfinch finch finchc2 gptalpha llama goldfinch_upgrade goldfinch_ablation_gptalpha goldfinch_ablation_rope10k
          goldfinch_ablation_gold_invratio_2 goldfinch_ablation_gold_invratio_6 finchc2_ablation_no_one_minus_w
          finchc2_ablation_no_v2"
sizes="L6D768minipile L12D768ctx1024minipile L24D2048ctx2048minipile L24D2048ctx4096minipile"
for name in $families; do
    bad=0
    for size in $sizes; do
        config -c $name -c $size --train.max_steps 2 || bad=1
        cp out.txt printed.yaml; config -c printed.yaml && cmp -s out.txt printed.yaml || bad=1
    done
    check "-c $name with each size prints, and reads back to the same" $bad
done
config -c llama -c L12D768ctx1024minipile && says tmix llama && says tmix2 "" && says cmix llama && says base 10000 &&
    says n_layer 12
check "llama at L12 D768" $?
config -c goldfinch_upgrade && says tmix x060 && says tmix2 gold && says inv_other_layer_ratio 6 && says base 0
check "goldfinch_upgrade" $?
config -c gptalpha -c finch --model.rope.base 0 && says tmix x060; check "a later config's mixer counts" $?
cat >paper.yaml <<'END'
model:
    __type__: configs.Transformer_Config   # the authors' layout
    tmix: gptalpha
    rope:
        __type__: configs.RoPE_Config
        rescale: 2.0
train:
    wandb: ''
END
config -c paper.yaml && says base 10000 && says rescale 2 && grep -q 'train.wandb is not used' err.txt
check "a section's own defaults, what is not used" $?
printf '{"model": {"tmix": "llama", "rope": null, "brope": {"rescale": 4}}}' >paper.json
config -c paper.yaml -c paper.json && says tmix llama && says base 0 && says rescale 4
check "JSON over YAML, null takes away" $?
unwanted() {                                            # unwanted PATTERN FLAGS...: exit 2, one line on stderr with PATTERN
    config "${@:2}"; local code=$?
    [ $code = 2 ] && [ "$(wc -l <err.txt)" = 1 ] && grep -qE -e "$1" err.txt
    check "exit 2, \"$1\"" $?
}
printf '\xef\xbb\xbfmodel:\r\n  tmix: "llama"\r\n  alibi: null\r\ntrain:\r\n  warmup_steps: -1\r\n  my_exit_tokens: 10_000\r\n' >dos.yaml
printf '  gradient_clip_val: 0\r\n' >>dos.yaml
config -c dos.yaml && [ ! -s err.txt ] && says tmix llama && says warmup_steps 10 && says my_exit_tokens 10000 && says gradient_clip_val 0
check "a byte order mark, CRLF, and what the authors' configs may hold" $?
printf '\xef\xbb\xbf{"train": {"data_file": "\\ud83d\\ude00\\u00e9", "warmup_steps": 12},\r\n "model": {"alibi": null}}\r\n' >dos.json
config -c dos.json && grep -q "data_file: \"$(printf '\xf0\x9f\x98\x80\xc3\xa9')\"" out.txt; check "JSON's pairs of escapes" $?
config --train.devices 1 --train.precision bf16 --train.wandb "" --train.val_check_interval 50 && says val_every 50 &&
    grep -q 'train.precision is not used here' err.txt && grep -q 'train.wandb is not used here' err.txt
check "flags as in the authors' configs" $?
config -c configs/finch.yaml && says tmix x060 && grep -q 'no such file here, so the built-in config finch' err.txt
check "-c configs/finch.yaml" $?
unwanted 'alibi: expected null' -c <(printf 'model:\n  alibi: 8\n')
for escapes in '\ud83d' '\ude00\ud83d' '\ud83dx' '\ud83d\u0041'; do
    printf '{"train": {"data_file": "%s"}}' "$escapes" >half.json
    unwanted 'half.json: byte [0-9]*: expected both halves of a character' -c half.json
done
unwanted 'model.rope.base: expected 0, as x060 has no attention' -c finch --model.rope.base 10000
unwanted 'model.brope.rescale: expected 0, as x060c2 has no attention' -c finchc2 --model.brope.rescale 1
unwanted 'model.rope.base: expected 0 where brope.rescale is set, found 10000' -c llama --model.brope.rescale 1
unwanted 'model.tmix2: expected one of x060c2 gold x060 .*, found "golden"' -c goldfinch --model.tmix2 golden
unwanted 'model.cmix: expected one of x060 x052 llama, found "x060c2"' --model.cmix x060c2
unwanted "model.tmix: 'gold' needs a layer before it" --model.tmix gold
unwanted "model.tmix2: 'gold' needs a layer before it" --model.n_layer 1
unwanted 'model.dim_att: with gold layers it must be n_embd, 128, found 256' --model.dim_att 256
unwanted 'compression_ratio: expected a number from 1 to 65536, found "0"' -c goldfinch --model.kv_cache_compression_ratio 0

echo "-- every mixer trains"
for mixers in "x060" "x060b" "x052 --model.cmix x052" "gptalpha --model.rope.base 10000" "x060 --model.tmix2 gptalpha" \
              "llama --model.cmix llama --model.brope.rescale 1" \
              "llama --model.tmix2 gold --model.cmix2 llama --model.rope.base 100"; do
    rm -rf m1 m2
    good "tmix $mixers" --model.tmix2 "" --model.tmix $mixers --train.max_steps 3 --train.save_every 2 --train.out m1
    cp -r m1 m2; good "resumed" --train.out m2 --train.resume 1 --train.max_steps 5
    good "with grad_cp 1" --model.tmix2 "" --model.tmix $mixers --train.max_steps 5 --train.grad_cp 1 --train.out m1
    cmp -s <(tail -n 2 m1/log.csv | cut -d, -f1-6) <(tail -n 2 m2/log.csv | cut -d, -f1-6); check "the same losses" $?
done

echo "-- resume, bit for bit"
run="--train.max_steps 20 --train.save_every 10 --train.val_every 1"
good "20 steps" $run --train.out a
[ "$(wc -l <a/log.csv)" = 21 ] && [ "$(head -n 1 a/log.csv)" = step,tokens,loss,val_loss,norm,lr,ms,tok_s,peak ]
check "log.csv has its header and 20 lines" $?
for try in 1 2 3 4 5; do
    rm -rf b; "$program" $tiny $utf8 $run --train.out b >out.txt 2>err.txt & pid=$!
    until_newer b "" $pid; kill -9 $pid 2>/dev/null; wait $pid 2>/dev/null
    [ "$(newest b)" = 000010 ] && break
done
[ "$(newest b)" = 000010 ]; check "killed after the checkpoint of step 10" $?
printf '15,960,1.0,,1.0,0.002,1.0,1,\n16,10' >>b/log.csv
good "10 + kill -9 + resume + 10" $run --train.out b --train.resume 1
same_run a b; check "same log columns, byte-identical files; the log was cut back" $?
good "a finished run has nothing to do" $run --train.out b --train.resume 1
"$program" --train.out b --train.resume 1 --train.max_steps 22 >out.txt 2>err.txt
check "resume takes its settings from the checkpoint" $?
cp "$text" other.txt; echo "more" >>other.txt
tr e f <"$text" >same.txt
refused 2 'same.txt: expected the data that this run began with, found as many tokens, but other ones' \
    --train.out b --train.resume 1 --train.data_file same.txt --train.max_steps 30
sed 's/"data_hash":/"data_hush":/; s/"step_tokens":/"step_tokins":/; s/"best_loss":/"best_lost":/' b/state_000022.safetensors >older
cp older b/state_000022.safetensors
good "a checkpoint of an older version" --train.out b --train.resume 1 --train.max_steps 24
refused 2 'other.txt: tokens, as before in this run: expected [0-9]+, found' \
    --train.out b --train.resume 1 --train.data_file other.txt --train.max_steps 30
good "resume where no run is begins one" --train.out empty --train.resume 1 --train.max_steps 1
grep -q "no checkpoint in empty/" out.txt; check "and says so" $?

echo "-- progress by tokens"
half="--train.my_exit_tokens 6400 --train.lr_init 1e-3 --train.lr_final 1e-4 --train.lr_decay_type linear --train.warmup_steps 0
      --train.val_every 0"
good "50 steps of 64 tokens" $half --train.max_steps 50 --train.out half
resized() {                                             # resized STEPS FLAGS...: goes on to 6,400 tokens, at that step
    rm -rf rest; cp -r half rest
    good "goes on with ${*:2}" $half --train.out rest --train.resume 1 "${@:2}"
    [ "$(sed -n 52p rest/log.csv | cut -d, -f6)" = 0.00055 ] && [ "$(tail -n 1 rest/log.csv | cut -d, -f1,2)" = "$1,6400" ] &&
        grep -qaE '"tokens":"6400"' rest/state_*$1.safetensors
    check "the learning rate, too; it ends at step $1, 6400 tokens" $?
}
resized 75 --train.micro_bsz 4
resized 150 --train.micro_bsz 1
resized 75 --train.accumulate_grad_batches 2
resized 75 --model.ctx_len 64
grep -q 'ctx_len is not what it was' out.txt && grep -qa '"samples":"100"' rest/state_000075.safetensors; check "samples as well" $?
resized 100 --train.micro_bsz 1 --train.accumulate_grad_batches 2
cp rest/log.csv split.csv; resized 100
cmp -s <(cut -d, -f1,2,6 split.csv) <(cut -d, -f1,2,6 rest/log.csv); check "and with another split of the step as before" $?
half="$half --train.warmup_steps 10 --train.lr_final 1e-3"
good "5 of 10 steps of warmup" $half --train.max_steps 5 --train.out warm
good "in steps twice as large" $half --train.out warm --train.resume 1 --train.micro_bsz 4 --train.max_steps 9
[ "$(tail -n 4 warm/log.csv | cut -d, -f6 | tr '\n' ' ')" = "0.0006 0.00076 0.00092 0.001 " ]; check "go on, and end, by tokens" $?

echo "-- the best model, and every n-th"
good "12 steps" --train.max_steps 12 --train.val_every 3 --train.keep_every 4 --train.save_every 0 --train.out keep
[ "$(ls keep | tr '\n' ' ')" = "$(echo log.csv model_0000{04,08,12}.safetensors model_best.safetensors state_0000{04,08,12}.safetensors val.txt) " ]
check "leave those of steps 4, 8 and 12, and the best" $?
best=$(awk -F, '$4 != "" && (!b || $4 < b) {b = $4; s = $1} END {print s}' keep/log.csv)
grep -qa "\"step\":\"$best\"" keep/model_best.safetensors; check "which is that of step $best" $?
cp keep/model_best.safetensors best.safetensors
good "a worse model" --train.out keep --train.resume 1 --train.max_steps 14 --train.val_every 1 --train.lr_init 1 --train.lr_final 1
cmp -s best.safetensors keep/model_best.safetensors; check "does not take its place when the run is resumed" $?

echo "-- one run in a folder"
"$program" $tiny $utf8 --train.out busy --train.save_every 0 --train.val_every 0 >busy.txt 2>&1 & pid=$!
for ((i = 0; i < 1000; i++)); do grep -qs '^step' busy.txt && break; sleep 0.01; done
ls busy >before.txt
refused 1 "busy/ is in use by another run, process $pid on .*; choose another folder" $utf8 --train.out busy
refused 1 "busy/ is in use by another run, process $pid" $utf8 --train.out busy --train.resume 1
ls busy | cmp -s - before.txt; check "and nothing was changed" $?
kill -INT $pid; wait $pid; check "the first one goes on to its end" $?
newest=$(newest busy); mv busy/model_$newest.safetensors busy/model_$newest.safetensors.77.tmp
"$program" --train.out busy --train.resume 1 --train.max_steps 1 >out.txt 2>err.txt && [ "$(newest busy)" = "$newest" ]
check "killed between the two files of its first checkpoint, it still has both" $?
touch busy/model_000099.safetensors.1234.tmp
good "the next one" --train.out busy --train.resume 1 --train.max_steps $((10#$newest + 1))
[ ! -e busy/model_000099.safetensors.1234.tmp ]; check "removes what a killed one left half written" $?

echo "-- kill -9 at random moments, a save after every step"
run="--train.save_every 1 --train.out k"
usable=0 hits=0 kills=24
for ((i = 0; i < kills; i++)); do
    before=$(newest k)
    "$program" $tiny $utf8 $run --train.resume 1 --train.max_steps 100000 >out.txt 2>err.txt & pid=$!
    [ $((i % 4)) = 3 ] || until_newer k "$before" $pid
    sleep "0.$(printf %03d $((RANDOM % 120)))"
    kill -9 $pid 2>/dev/null; wait $pid 2>/dev/null
    step=$(newest k)
    [ ! -s err.txt ] && { [ -z "$step" ] || [ -e "k/state_$step.safetensors" ]; } && usable=$((usable + 1))
    [ "$(ls k | grep -cE '^(model|state)_.*safetensors')" != 2 ] && hits=$((hits + 1))
done
[ $usable = $kills ]; check "$kills kills ($hits in the middle of a save) always left a usable pair" $?
last=$((10#$(newest k) + 2))
good "the run goes on to step $last" $run --train.resume 1 --train.max_steps $last
good "the same without kills" --train.out l --train.save_every 0 --train.max_steps $last
same_run k l; check "same log columns, byte-identical files" $?

echo "-- signals"
for signal in INT TERM; do
    rm -f out.txt
    "$program" $tiny $utf8 --train.out s --train.save_every 0 --train.val_every 0 >out.txt 2>err.txt & pid=$!
    for ((i = 0; i < 1000; i++)); do grep -qs '^step  *3 ' out.txt && break; sleep 0.01; done
    kill -$signal $pid; wait $pid; check "SIG$signal: exit 0" $?
    step=$(tail -n 1 s/log.csv | cut -d, -f1)
    [ -n "$step" ] && [ "$step" -ge 3 ] && [ "$(newest s)" = "$(printf %06d "$step")" ]
    check "SIG$signal: the step in work was finished, logged and saved" $?
done
interrupted() {                                         # interrupted PATTERN FLAGS...: Ctrl-C once PATTERN was printed; ends at once
    rm -rf s3 out.txt
    "$program" $tiny $utf8 --train.out s3 --train.max_steps 3 "${@:2}" >out.txt 2>err.txt & pid=$!
    for ((i = 0; i < 1000; i++)); do grep -qs "$1" out.txt && break; sleep 0.01; done
    local begin=$(date +%s%N); kill -INT $pid; sleep 0.1; kill -INT $pid 2>/dev/null; wait $pid; local code=$?
    [ $code = 0 ] && [ $((($(date +%s%N) - begin) / 1000000)) -lt 3000 ]
    check "Ctrl-C, twice, ends it at once" $?
    [ -n "$(newest s3)" ] && grep -q 'stopped by a signal' out.txt; check "and all is saved" $?
}
for ((i = 0; i < 200; i++)); do cat "$text"; done >long.txt
echo "- in a step of many micro-batches"; interrupted "^activations" --train.accumulate_grad_batches 100000 --train.max_steps 1
[ "$(newest s3)" = 000000 ] && [ "$(wc -l <s3/log.csv)" = 1 ]; check "a step that was dropped" $?
good "goes on from there" --train.out s3 --train.resume 1 --train.accumulate_grad_batches 1 --train.max_steps 2
echo "- in a validation"; interrupted "^step  *1 " --train.validation_data_file long.txt --train.val_batches 0 --train.val_every 1
[ "$(newest s3)" = 000001 ] && [ "$(wc -l <s3/log.csv)" = 2 ]; check "with the step before it" $?
echo "- in a sample"; interrupted "^sample" --train.sample_every 1 --train.val_every 0 --model.ctx_len 512
[ "$(newest s3)" = 000001 ]; check "with the step before it" $?
"$program" $tiny $utf8 --train.out s2 --train.save_every 0 2>err.txt | head -n 30 >out.txt
[ "${PIPESTATUS[0]}" = 0 ] && [ "$(newest s2)" = "$(printf %06d "$(tail -n 1 s2/log.csv | cut -d, -f1)")" ]
check "so it is when the reader of its output goes away" $?
ls s/log.csv s/log.csv.old s/model_*.safetensors s/model_*.safetensors.old s/state_*.old s/val.txt.old >/dev/null 2>err.txt
check "a run already in the folder is kept as *.old" $?
old=$(head -n 2 s/log.csv)
good "a third run" --train.out s --train.max_steps 2
[ "$(head -n 2 s/log.csv.old)" = "$old" ] && [ "$(ls s | grep -c 'model_.*old$')" = 1 ]; check "for one generation" $?

echo "-- determinism"
run="--train.max_steps 6 --train.val_every 3"
OMP_NUM_THREADS=1 good "OMP_NUM_THREADS=1" $run --train.out d1
OMP_NUM_THREADS=2 good "OMP_NUM_THREADS=2" $run --train.out d2
same_run d1 d2; check "same bits" $?
if grep -q '^machine *CPU' out.txt; then
    CUDA_ON_CPU_TWINS=0 good "kernels, none of their twins in plain loops" $run --train.out d0
    grep -q '"BF16"' d0/model_000006.safetensors && most=1e-2 || most=1e-5
    paste -d , d0/log.csv d1/log.csv | awk -F, -v most=$most 'function far(a, b) { return a - b > most * b || b - a > most * b }
        NR > 1 { steps++; bad += $1 != $(1 + NF / 2) || far($3, $(3 + NF / 2)) || far($5, $(5 + NF / 2)) }
        END { exit !(steps == 6 && !bad) }'
    check "the same losses and norms, to $most of each" $?
    for order in reverse 7; do
        CUDA_ON_CPU_ORDER=$order good "CUDA_ON_CPU_ORDER=$order" $run --train.out d3
        same_run d0 d3; check "same bits" $?
    done
fi
good "2 sequences x 2 accumulated" --train.max_steps 1 --train.accumulate_grad_batches 2 --train.out d4
good "4 sequences x 1" --train.max_steps 1 --train.micro_bsz 4 --train.out d5
tail -q -n 1 d4/log.csv d5/log.csv | awk -F, '{ t[NR] = $2; l[NR] = $3 }
    END { d = l[1] / l[2] - 1; exit !(t[1] == 128 && t[2] == 128 && d < 2e-3 && d > -2e-3) }'
check "same tokens, same loss" $?

echo "-- numbers that are not finite"
refused 3 'step 2: not finite .*: first in [a-z].*; last good checkpoint: n/model_000001' $utf8 --train.out n --train.save_every 1 \
    --train.lr_init 1e30 --train.warmup_steps 0
[ -e n/model_000001.safetensors ] && [ -e n/state_000001.safetensors ] && [ "$(wc -l <n/log.csv)" = 3 ]
check "the last good checkpoint stays" $?
good "a model to plant a NaN in" --train.train_stage 1 --train.out i
[ "$(newest i)" = 000000 ] && [ ! -e i/log.csv ]; check "train_stage 1 initializes, saves and stops" $?
cp -r i i2
good "and its state goes on" --train.resume 1 --train.max_steps 2 --train.out i2
model=i/model_000000.safetensors
data_at=$((8 + $(u64_at $model 0)))
head_at=$(head -c $data_at $model | grep -aoE '"head.weight":\{[^}]*' | grep -oE '[0-9]+,[0-9]+\]$' | cut -d, -f1)
sed 's/"hash":/"hush":/' $model >nan.safetensors          # a file without a hash, as others write them
patch nan.safetensors $((data_at + head_at)) '\xff\xff\xff\xff\xff\xff\xff\xff'
refused 3 'step 1: not finite .*: first in [a-z].*; last good checkpoint: none' $utf8 --train.out n2 --train.load_model nan.safetensors

echo "-- weights from a file"
sed 's/"hash":/"hush":/' $model >plain.safetensors
good "load_model" --train.load_model plain.safetensors --train.out w1 --train.max_steps 3
good "the same from the seed" --train.out w2 --train.max_steps 3
cmp -s <(cut -d, -f1-6 w1/log.csv) <(cut -d, -f1-6 w2/log.csv) || grep -q '"BF16"' $model   # bf16 weights are rounded masters
check "the same run" $?
good "a stage 1 folder is gone on with" --train.out i --train.resume 1 --train.max_steps 3
cmp -s <(cut -d, -f1-6 i/log.csv) <(cut -d, -f1-6 w2/log.csv); check "the same run" $?
good "another vocabulary" --train.train_stage 1 --model.vocab_size 320 --train.out v
wide=v/model_000000.safetensors
refused 2 "model.vocab_size: expected 320, as in $wide, found 264" $utf8 --train.load_model $wide
sed 's/"model.n_layer":/"model.n_lawer":/' $wide >bare.safetensors       # no settings, as in files by others
train $utf8 --train.load_model bare.safetensors
[ $? = 2 ] && grep -qE 'bare.safetensors: tensor (emb|head).weight: shape: expected \(264, 64\), found \(320, 64\)' err.txt
check "without settings in the file, the tensors' shapes tell" $?
grep -q 'bare.safetensors: no settings in its metadata, so these were assumed: .*use_v2 1 parallel 0 .*rope.base 0' err.txt
check "and what they do not tell was assumed, and said" $?
good "a model with other switches" --train.max_steps 3 --model.parallel 1 --model.use_v2 0 --train.out switches
model=switches/model_000003.safetensors
good "its settings" --train.load_model $model --train.max_steps 1 --train.out w4
grep -q 'use_v2 0 | parallel 1' out.txt; check "come from its file" $?
refused 2 "model.parallel: expected 1, as in $model, found 0" $utf8 --train.load_model $model --model.parallel 0
refused 2 'model.use_v2: expected 0, as in switches/state_000003.safetensors, found 1' $utf8 --train.out switches --train.resume 1 \
    --model.use_v2 1 --train.max_steps 5
refused 2 'model.tmix: expected x060c2, as in .*, found x060' $utf8 --train.load_model $model -c finch
sed -E 's/"hash":"[0-9a-f]{4}/"hash":"0000/' $model >again.safetensors    # as saved again by another program
good "a file saved again" --train.load_model again.safetensors --train.max_steps 1 --train.out w5
grep -q 'again.safetensors: not the bytes that were saved here' err.txt; check "opens, and that is said" $?
cmp -s <(cut -d, -f1-6 w4/log.csv) <(cut -d, -f1-6 w5/log.csv); check "the same weights" $?
sed -E 's/"head.weight":/"tail.weight":/' $model >tied.safetensors
refused 2 'tensor head.weight: expected in the file, found none .a tied head\?' $utf8 --train.load_model tied.safetensors
good "load_partial" --train.load_model $wide --train.load_partial 1 --train.max_steps 1 --train.out w3
[ "$(grep -c 'emb.weight: shape: expected\|head.weight: shape: expected' out.txt)" = 2 ] && [ "$(grep -c 'keeps its' out.txt)" = 2 ]
check "lists what does not fit" $?

echo "-- damaged checkpoints"
damage() {                                              # damage PATTERN SED-SCRIPT: one change of the file, refused
    sed "$2" plain.safetensors >bad.safetensors
    refused 2 "bad.safetensors: $1" $utf8 --train.load_model bad.safetensors
}
name='[a-z0-9_.]+'
damage "tensor $name: data_offsets: expected \[0, " 's/"data_offsets":\[0,/"data_offsets":[4,/'
damage "tensor $name: data_offsets: expected" 's/"shape":\[264,64\]/"shape":[264,65]/'
damage "tensor $name: dtype: expected F32, BF16 or the like, found X" 's/"dtype":"[BF]/"dtype":"X/'
damage "tensor $name: expected dtype, shape and data_offsets, found kind" 's/"dtype"/"kind"/'
damage 'tensor emb.weight: expected in the file, found none' 's/"emb.weight"/"emb_weight"/'
damage "header, byte [0-9]+: expected ':', found ','" 's/"emb.weight":/"emb.weight",/'
damage 'tensor emb.weight: expected once, found twice' 's/"head.weight"/"emb.weight"/'
size=$(stat -c %s plain.safetensors)
head -c $((size - 100)) plain.safetensors >bad.safetensors
refused 2 'bad.safetensors: tensor .*: data_offsets: expected .* within' $utf8 --train.load_model bad.safetensors
cp plain.safetensors bad.safetensors; patch bad.safetensors 9 '{'
refused 2 "bad.safetensors: header, byte 1: expected '\"', found '\{'" $utf8 --train.load_model bad.safetensors
head -c 7 plain.safetensors >bad.safetensors
refused 2 'bad.safetensors: size: expected 10 or more, found 7' $utf8 --train.load_model bad.safetensors
head -c 300 plain.safetensors >bad.safetensors
refused 2 'bad.safetensors: header length: expected 2 to 292, found' $utf8 --train.load_model bad.safetensors
{ cat plain.safetensors; echo; } >bad.safetensors
refused 2 'bad.safetensors: bytes of data: expected [0-9]+, found' $utf8 --train.load_model bad.safetensors
: >bad.safetensors
refused 2 'bad.safetensors: the file is empty' $utf8 --train.load_model bad.safetensors
printf 'version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n' >bad.safetensors
refused 2 'bad.safetensors: expected the file itself, found a pointer of Git LFS to it: .git lfs pull' $utf8 --train.load_model bad.safetensors
printf 'PK\3\4........' >bad.safetensors
refused 2 'bad.safetensors: expected no archive, found a zip or a PyTorch checkpoint: dev/convert.py' $utf8 --train.load_model bad.safetensors
for half in model state; do
    rm -rf p; cp -r a p; patch p/${half}_000020.safetensors $(($(stat -c %s p/${half}_000020.safetensors) - 9)) '\x01\x02\x03'
    refused 2 "p/${half}_000020.safetensors: hash of the data" $utf8 --train.out p --train.resume 1
done
rm -rf p; cp -r a p; rm p/state_000020.safetensors
refused 2 'p/state_000020.safetensors: No such file' $utf8 --train.out p --train.resume 1
good "a run with another seed" --train.seed_everything 2 --train.max_steps 20 --train.out q
cp q/state_000020.safetensors p/
refused 2 'p/state_000020.safetensors: metadata, field model_hash: expected .* as in p/model_000020' $utf8 --train.out p --train.resume 1
refused 2 'model.vocab_size: expected 264, as in a/state_000020.safetensors, found 272' $utf8 --train.out a --train.resume 1 \
    --train.max_steps 30 --model.vocab_size 272
rm -rf p; cp -r a p; rm p/model_000020.safetensors; ls p >before.txt
refused 2 'p/ holds state_000020.safetensors, but no model' $utf8 --train.out p --train.resume 1
ls p | cmp -s - before.txt; check "and nothing was renamed" $?
"$program" --train.out p --train.resume 1 >out.txt 2>err.txt
[ $? = 2 ] && ls p | cmp -s - before.txt; check "nor by a demo" $?
"$program" --train.out pp --train.resume 1 >out.txt 2>err.txt
[ $? = 2 ] && grep -q 'pp/ does not exist; to begin a run there, say what it trains on' err.txt && [ ! -e pp ]
check "a folder misspelt is no demo's" $?

echo "-- binidx"
binidx() {                                              # binidx PREFIX: 300 u16 tokens in two documents
    little_endian 2 $(seq 0 149) $(seq 100 249) >"$1.bin"
    { printf 'MMIDIDX\0\0'; little_endian 8 1; little_endian 1 8; little_endian 8 2 3; little_endian 4 150 150
      little_endian 8 0 300 0 1 2; } >"$1.idx"
}
binidx pair
train --train.data_file pair.bin --train.validation_data_file pair --train.max_steps 2 --train.out x; check "a pair trains" $?
grep -q 'pair.bin: 300 tokens in 2 documents, magic prime 5; validation: pair.bin, 300 tokens' out.txt; check "as counted" $?
broken() {                                              # broken PATTERN idx|bin OFFSET BYTES: one change of the pair, refused
    binidx bad; patch "bad.$2" "$3" "$4"; refused 2 "$1" --train.data_file bad --train.out y --model.ctx_len 27
}
broken 'bad.idx: magic: expected "MMIDIDX"' idx 0 'X'
broken 'bad.idx: version: expected 1, found 2' idx 9 '\x02'
broken 'bad.idx: data type: expected 1, 2, 3, 4, 5 or 8 .*, found 7' idx 17 '\x07'
broken 'bad.idx: sequences: expected 0 to 6, found 514' idx 19 '\x02'
broken 'bad.idx: data type: expected .*, found 200' idx 17 '\xc8'
broken 'bad.idx: size: expected 70, found 82' idx 18 '\x01'
broken 'bad.idx: document marks: expected 1 to 10, found 0' idx 26 '\x00'
broken 'bad.idx: sizes\[1\]: expected 0 to 2147483647, found -1' idx 38 '\xff\xff\xff\xff'
broken 'bad.idx: offsets\[1\]: expected 300, found 302' idx 50 '\x2e'
broken 'bad.idx: documents\[1\]: expected 0 to 2, found 9' idx 66 '\x09'
broken 'bad.bin: size: expected 602, found 600' idx 38 '\x97'
broken 'bad.bin: token\[[0-9]+\]: expected 0 to 263, found 500' bin 0 "$(printf '\\xf4\\x01%.0s' {1..300})"
binidx bad; head -c 70 bad.idx >cut.idx; cp bad.bin cut.bin
refused 2 'cut.idx: size: expected 82, found 70' --train.data_file cut --train.out y
head -c 20 bad.idx >cut.idx; refused 2 'cut.idx: size: expected 34 or more, found 20' --train.data_file cut --train.out y
binidx cut; head -c 599 bad.bin >cut.bin
refused 2 'cut.bin: size: expected 600, found 599' --train.data_file cut --train.out y
refused 2 'pair.bin: tokens, at least 2 ctx_len \+ 1: expected 513 or more, found 300' --train.data_file pair --model.ctx_len 256

marks() {                                               # marks NUMBER...: three sequences, and these document marks
    little_endian 2 $(seq 0 149) $(seq 100 249) >marks.bin
    { printf 'MMIDIDX\0\0'; little_endian 8 1; little_endian 1 8; little_endian 8 3 $#; little_endian 4 100 100 100
      little_endian 8 0 200 400 "$@"; } >marks.idx
}
for list in "0 2 3" "0 1 1 2 3" "0 1 2 3" "0 3"; do      # as Megatron writes documents of several sequences, or of none
    marks $list; train --train.data_file marks --train.max_steps 1 --train.out x
    [ $? = 0 ] && grep -q "300 tokens in $(($(wc -w <<<"$list") - 1)) documents" out.txt; check "document marks $list" $?
done
marks 0; refused 2 'marks.idx: documents: expected marks up to the last sequence, 3, found them to end at 0' --train.data_file marks
train --train.data_file pair --train.max_steps 1 --train.out x
grep -q 'pair.bin: the sampler sees 5 of 9 stretches of ctx_len tokens, .*; --model.ctx_len 27 would see nearly all' err.txt
check "what the sampler never sees is said" $?
train --train.data_file pair --train.max_steps 1 --train.out x --model.ctx_len 27 && [ ! -s err.txt ]; check "and its remedy is one" $?

echo "-- texts"
said() { good "$1" "${@:3}" --train.max_steps 1 --train.val_every 0 --train.out x; grep -qE -e "$2" out.txt; check "\"$2\"" $?; }
head -n 250 "$text" >lines.txt
{ printf '\xef\xbb\xbf'; sed 's/$/\r/' lines.txt; } >windows.txt
said "a text of Windows" "windows.txt: 250 times .r.n, taken as .n" --train.data_file windows.txt
grep -q 'windows.txt: its byte order mark is left out' out.txt; check "and its mark" $?
cmp -s <(cut -d, -f1-6 x/log.csv) <(train $utf8 --train.data_file lines.txt --train.max_steps 1 --train.val_every 0 --train.out y; cut -d, -f1-6 y/log.csv)
check "gives the same run" $?
{ cat "$text"; echo '<|endoftext|> and <|endoftext|>'; } >ends.txt
said "a text with marks" 'ends.txt: 2 times <.endoftext.>, which is text' --train.data_file ends.txt
head -c 300 "$text" >brief.txt
said "a text with too small a tenth" 'brief.txt: 300 tokens, .*; validation: none, as a tenth' --train.data_file brief.txt
{ printf '\xff\xfe'; cat "$text"; } >wide.txt; refused 2 'wide.txt: expected UTF-8, found UTF-16' $utf8 --train.data_file wide.txt

echo "-- inference"
infer=$(dirname "$program")/infer_goldfinch
infer() { "$infer" "$@" >out.txt 2>err.txt; }
declined() {                                            # declined PATTERN FLAGS...: exit 2, one line on stderr with PATTERN in it
    infer "${@:2}"; local code=$?
    [ $code = 2 ] && [ "$(wc -l <err.txt)" = 1 ] && grep -qE -e "$1" err.txt
    check "exit 2, \"$1\"" $?
}
train $utf8 --train.max_steps 30 --train.val_every 30 --train.val_batches 0 --train.out out; check "a model to run" $?
model=out/model_000030.safetensors
infer -p "the " -n 40 -s 5; check "a prompt goes on, from the newest checkpoint in out/" $?
cp out.txt first.txt
grep -qE 'prompt 4 tokens, .* decode .* context [0-9]+ tokens \| cache .*, (20|36) bytes per token \(a transformer: .*, 768\)' err.txt
check "the closing line" $?
infer $model -p "the " -n 40 -s 5; cmp -s out.txt first.txt; check "the same seed, the same text" $?
infer $model -p "the " -n 40 -s 6; ! cmp -s out.txt first.txt; check "another seed, another text" $?
OMP_NUM_THREADS=2 infer $model -p "the " -n 40 -s 5; cmp -s out.txt first.txt; check "and whatever OMP_NUM_THREADS" $?
printf 'the ' | infer -f - -n 40 -s 5; cmp -s out.txt first.txt; check "the prompt from a pipe" $?
infer -p "the " -n 40 -t 0 --kv full; cp out.txt full.txt; infer -p "the " -n 40 -t 0; cmp -s out.txt full.txt
check "--kv full writes the same at temperature 0" $?
for twins in 0 1; do CUDA_ON_CPU_TWINS=$twins infer -p "the " -n 40 -t 0 && mv out.txt twins$twins.txt; done
cmp -s twins0.txt twins1.txt; check "without a GPU: kernels and their twins in plain loops write the same" $?
infer -p "the " -n 40 -t 0 --kv int8; check "--kv int8" $?
infer -p "the " -n 40 -s 5 --save-state state.st; check "a state saved after the prompt" $?
cp out.txt saved.txt; infer -n 40 -s 5 --load-state state.st; cmp -s out.txt saved.txt; check "goes on with the same tokens when loaded" $?
infer -p "xyz" -n 10 -s 5 --load-state state.st; check "and with a further prompt" $?
printf 'one\ntwo\n' | infer -i -n 5; check "lines, one after the other" $?
for mixers in "x052" "gptalpha --model.rope.base 10000" "llama --model.tmix2 gold --model.cmix llama --model.rope.base 100"; do
    train $utf8 --model.tmix2 "" --model.tmix $mixers --train.max_steps 2 --train.out mixed
    mixed=mixed/model_000002.safetensors
    infer $mixed -p "$(head -c 1000 "$text")" -n 24 --ignore-eos --save-state mixed.st && tail -n 1 err.txt >closing.txt
    cached=$(sed -E 's/.*\| cache ([^,]*), ([0-9]+) bytes.*/\2 \1/' closing.txt)
    infer $mixed --cache-table
    [ "$(awk 'NR == 2 {print $5, $6, $7}' out.txt)" = "$cached" ]
    check "tmix $mixers: --cache-table at 1 k is what a run carries, $cached" $?
done
loss=$(awk -F, '$4 != "" {print $4}' out/log.csv | tail -n 1)
infer --score out/val.txt --window 32
awk -v want="$loss" '{for (i = 1; i <= NF; i++) if ($i == "loss") {d = $(i + 1) - want; exit !(d < 1e-3 && d > -1e-3)}}' out.txt
check "--score --window: the trainer's validation loss, $loss, to 1e-3" $?
"$infer" -p "a" -n 100000 2>err.txt | head -c 20 >out.txt; [ "${PIPESTATUS[0]}" = 0 ] && [ ! -s err.txt ]
check "a closed pipe ends it silently" $?
"$infer" -p "a" -n 1000000 --ignore-eos >out.txt 2>err.txt & sleep 1; kill -INT $!; wait $!
[ $? = 0 ] && grep -q 'context [0-9]* tokens' err.txt; check "SIGINT: the closing line, exit 0" $?
declined 'unknown flag "--top-q"' --top-q 1
declined '-n: expected a whole number from 0' -p a -n x
declined 'a prompt is missing' $model
declined '-p: expected a prompt, found an empty one' -p ""
declined 'nowhere.txt: No such file' -f nowhere.txt
declined 'kv: expected bf16, int8 or full, found "int4"' -p a --kv int4
declined 'nowhere.safetensors: No such file' nowhere.safetensors -p a
head -c 5000 $model >cut.safetensors; declined 'cut.safetensors: ' cut.safetensors -p a
sed 's/"dtype":"F32"/"dtype":"F16"/; s/"dtype":"BF16"/"dtype":"I16" /' $model >type.safetensors; declined 'type.safetensors: ' type.safetensors -p a
sed 's/"model.n_embd":"64"/"model.n_embd":"128"/' $model >shape.safetensors; declined 'shape.safetensors: ' shape.safetensors -p a
declined 'tokens does not fit this machine.s memory: [0-9]+ tokens do' -p a -n 1000000000000
train $utf8 --train.max_steps 1 --train.seed_everything 9 --train.out other
sed -E 's/"hash":"[0-9a-f]{4}/"hash":"0000/' other/model_000001.safetensors >again.safetensors
infer again.safetensors -p a -n 1 && grep -q 'again.safetensors: not the bytes' err.txt; check "a file saved again runs" $?
declined 'state.st: metadata, field model_hash: expected .*made anew' other/model_000001.safetensors -p a --load-state state.st
printf '1 "a" 1\n2 "bc" 3\n' >vocab.txt; declined 'vocab.txt: line 2: length: expected 2, found 3' -p a --vocab vocab.txt
printf '1 "a" 1\n' >vocab.txt; declined 'vocab.txt: ' -p a --vocab vocab.txt

echo "$passed passed, $failed failed"
[ $failed = 0 ]
