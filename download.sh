#!/usr/bin/env bash
# How do LLaMA's weights get from Meta's signed link into a folder, whole and unaltered?
#
#     PRESIGNED_URL='https://...' ./download.sh [SIZES] [FOLDER]    e.g. 7B,13B /data/llama
#
# What is missing of link, sizes and folder is asked for. The link's * stands for a file's path.
# A file grows as NAME.part and becomes NAME once its md5 sum is right, so the same command again
# skips what is there and resumes what is not.
# Limits: the sums are LLaMA 1's. That of params.json comes from checklist.chk, by the same link.
# Of two runs in one folder the second stops; it cannot see one of another user or machine. Runs in
# bash 3.2.
set -euf -o pipefail # -f: neither the link's * nor anything else here is a file pattern

SUMS="
eeec4125e9c7560836b4873b6f8e3025  tokenizer.model
6efc8dab194ab59e49cd24be5574d85e  7B/consolidated.00.pth
0804c42ca65584f50234a86d71e6916a  13B/consolidated.00.pth
016017be6040da87604f77703b92f2bc  13B/consolidated.01.pth
f856e9d99c30855d6ead4d00cc3a5573  30B/consolidated.00.pth
d9dbfbea61309dc1e087f5081e98331a  30B/consolidated.01.pth
2b2bed47912ceb828c0a37aac4b99073  30B/consolidated.02.pth
ea0405cdb5bc638fee12de614f729ebc  30B/consolidated.03.pth
9deae67e2e7b5ccfb2c738f390c00854  65B/consolidated.00.pth
0c4b00c30460c3818bd184ee949079ee  65B/consolidated.01.pth
847194df776dd38f8ae9ddcede8829a1  65B/consolidated.02.pth
3b6c8adcb5654fd36abab3206b46a0f1  65B/consolidated.03.pth
68d61d1242597ad92616ec31b8cb6b4c  65B/consolidated.04.pth
7f71259eaee2b906aa405d8edf39925f  65B/consolidated.05.pth
0574e26b6891ab2cb0df7340d773fe9b  65B/consolidated.06.pth
e5d9790df955270b836aec79462ead22  65B/consolidated.07.pth
"
TRIES=8 # connections a file, with pauses of 2, 4, 6 ... s: about a minute without network
USAGE="run PRESIGNED_URL='https://...' ./download.sh 7B,13B /data/llama"
EXPIRED="the link has probably expired, request a new one"

say() { printf '%s\n' "$*" >&2; }
fail() { say "$* run the same command again"; failed=$((failed + 1)); }
die() { say "download.sh: $*"; exit 1; }
have() { command -v "$1" > /dev/null; }
sum_of() { awk -v name="$1" '$2 == name || $2 == "*" name { print $1 }'; }
md5_of() { if have md5sum; then md5sum < "$1" | cut -d ' ' -f 1; else md5 -q "$1"; fi; }

ask() { # $1: what is missing; the reply goes to $answer
  [ -t 0 ] || die "no $1 given and no terminal to ask at: $USAGE"
  # -e: readline, as a terminal's own line editor cuts a long link (macOS: at 1,024 characters)
  read -r -e -p "$1: " answer && [ -n "$answer" ] || die "no $1 given: $USAGE"
}

# Append to the file $2 what it lacks of the path $1. The address is piped from a builtin, as `ps`
# shows arguments and older versions of bash put a here-document in a file. All in the background,
# where the trap can end it: an orphan would write on into the next run's .part.
transfer() {
  local address="${url%%\**}$1${url#*\*}" progress
  if [ $tool = curl ]; then
    [ -t 2 ] && progress=--progress-bar || progress=--silent
    printf 'url = "%s"\n' "$address" | curl --config - --globoff --location --fail --show-error \
      --connect-timeout 30 --speed-limit 1 --speed-time 60 $progress -C - --output "$2" \
      --write-out ', HTTP %{http_code}' > "$status" &
  else # quiet, as otherwise wget prints the address
    [ -t 2 ] && progress=--show-progress || progress=--quiet
    printf '%s\n' "$address" | wget --input-file=- --tries=1 --timeout=60 --quiet $progress \
      --continue --output-document="$2" > "$status" &
  fi
  child=$!
  wait $child
}

fetch() { # $1: path, $2: its md5 sum where SUMS lacks it; a checklist has none anywhere
  local file="$folder/$1" part="$folder/$1.part" try=1 rc first found sum
  sum=${2:-$(printf '%s' "$SUMS" | sum_of "$1")}
  [ ! -d "$file" ] || die "$file is a folder: move it elsewhere and run again"
  if [ -e "$file" ]; then
    found=$(md5_of "$file")
    [ "$found" = "${sum:-$found}" ] || fail "$file has md5 sum $found, not $sum: delete it and"
    return 0
  fi
  say "$1: downloading"
  { mkdir -p "${file%/*}" && : >> "$part"; } 2> /dev/null ||
    die "cannot write $part: free space or choose another folder"
  while :; do
    rc=0; transfer "$1" "$part" || rc=$?
    child='' rc="$tool exit $rc$(< "$status")"
    case $rc in
      *"exit 0"* | *"HTTP 416") break ;; # 416: no byte is missing, so the sum decides
      *"HTTP 5"* | *"HTTP 429") ;; # busy
      "curl exit 22"*) die "the server refused $1 ($rc): $EXPIRED" ;;
      "wget exit 8"*) die "the server refused $1 or is busy ($rc): run again later, or $EXPIRED" ;;
      "curl exit 23"* | "wget exit 3"*) die "cannot write $part ($rc): free space, run again" ;;
      "curl exit 33"*) : > "$part" ;; # no ranges here: from the start, then
    esac
    [ $try -lt $TRIES ] || die "no $1 ($rc): check the network and run again to resume"
    say "$1: interrupted ($rc), trying again in $((2 * try)) s"
    sleep $((2 * try++))
  done
  # An error page sent as a success begins with <. Only blanks may come before it: a tokenizer.model
  # begins with a line feed, a control character, again the two, then <unk>.
  first=$(head -c 64 "$part" | LC_ALL=C tr -d '\000[:space:]' | LC_ALL=C cut -c 1)
  [ "$first" != "<" ] || { rm -f "$part"; die "a web page came as $1: $EXPIRED"; }
  found=$(md5_of "$part")
  if [ "$found" = "${sum:-$found}" ]; then mv -f "$part" "$file"; return; fi
  rm -f "$part" # to resume it would repeat the error
  fail "$1 came with md5 sum $found, not $sum, and was deleted:"
}

[ $# -le 2 ] || die "$# arguments, but SIZES (joined by commas) and FOLDER are two: $USAGE"
tool=curl
have curl || tool=wget
have $tool || die "neither curl nor wget found: install one of them"
have md5sum || have md5 || die "neither md5sum nor md5 found: install coreutils"
url=${PRESIGNED_URL:-} sizes=${1:-} folder=${2:-} failed=0 child=''
export -n PRESIGNED_URL url # the tools need not inherit it
trap 'kill $child 2> /dev/null; exit 130' INT TERM HUP

[ -n "$url" ] || { ask "link (PRESIGNED_URL)"; url=$answer; }
case $url in
  *[[:space:][:cntrl:]\"\\]*) die "the link has a blank, quote or backslash in it: copy it alone" ;;
  http://*\** | https://*\**) ;;
  *) die "the link is not http(s)://... with a * in it: copy its whole text, in single quotes" ;;
esac
[ -n "${sizes//[,[:space:]]/}" ] || { ask "sizes (some of 7B,13B,30B,65B)"; sizes=$answer; }
for size in ${sizes//,/ }; do
  [[ $SUMS = *"  $size/consolidated.00.pth"* ]] ||
    die "no size $size: choose from 7B,13B,30B,65B (30B is the paper's 33B)"
done
[ -n "$folder" ] || { ask "folder"; folder=$answer; }
case $folder in
  \~ | \~/*) folder=${HOME:?is not set: pass the whole path}${folder#?} ;; # no shell expands a typed one
  [!/]*) folder=./$folder ;; # its name may begin with -
esac

status=$folder/.http_status # curl's, as a background process cannot set a variable
lock=$folder/.downloading # holds the process that downloads here; a killed one left it
claim() { (set -C; : > "$lock") 2> /dev/null; } # -C: unless it is there
mkdir -p "$folder" 2> /dev/null || die "cannot make $folder: choose another folder"
if ! claim; then
  [ -e "$lock" ] || die "cannot write $lock: free space or choose another folder"
  other=$(< "$lock")
  if [ -n "$other" ] && ! kill -0 "$other" 2> /dev/null; then rm -f "$lock"; fi
  claim ||
    die "another run (process ${other:-unknown}) is downloading to $folder: let it end, or delete $lock"
fi
trap 'rm -f "$status" "$lock"' EXIT
echo $$ 2> /dev/null > "$lock" || die "cannot write $lock: free space or choose another folder"
fetch tokenizer.model
fetch tokenizer_checklist.chk
for size in ${sizes//,/ }; do
  fetch "$size/checklist.chk"
  params=$(sum_of params.json < "$folder/$size/checklist.chk")
  [ -n "$params" ] || die "no params.json in $folder/$size/checklist.chk: delete it and run again"
  fetch "$size/params.json" "$params"
  for path in $(printf '%s' "$SUMS" | awk -v size="$size/" 'index($2, size) == 1 { print $2 }'); do
    fetch "$path"
  done
done
[ $failed = 0 ] || die "$failed of the files failed, as said above"
say "$folder holds $sizes, whole"
