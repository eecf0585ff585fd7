#!/bin/bash
# Stands in for gcloud, kubectl, sbatch, ...: records how it was called and plays what the test wrote into $FAKE.
#
# $FAKE/rules/*: line 1 a regular expression for "program arguments", line 2 the exit code, then what is printed (to
# standard error when the code is not 0). A rule whose name ends in "once" is used up. Without a rule: success, silence.
line=$(basename "$0")$(printf ' %q' "$@")
exec 9>>"$FAKE/calls"
flock 9
echo "$line" >&9
for rule in "$FAKE"/rules/*; do
  [[ -e $rule ]] || continue
  { IFS= read -r pattern && IFS= read -r code; } <"$rule"
  if [[ $line =~ $pattern ]]; then
    text=$(tail -n +3 "$rule")
    [[ $rule == *once ]] && rm "$rule"
    flock -u 9
    if ((code)); then echo "$text" >&2; elif [[ -n $text ]]; then echo "$text"; fi
    exit "$code"
  fi
done
flock -u 9
exec 9>&-
case "$(basename "$0") $1 $2" in
"gcloud storage cp") cp "$3" "$FAKE/bucket/$(basename "$4")" ;;
"gcloud storage cat") cat "$FAKE/bucket/$(basename "$3")" ;;
gcsfuse*) touch "$FAKE/mounted" ;;
mountpoint*) [[ -e $FAKE/mounted ]] ;;
python3*) [[ $3 != venv ]] || { mkdir -p "$HOME/densevit/venv/bin" && cp "$FAKE/host_python" "$HOME/densevit/venv/bin/python"; } ;;
lsb_release*) echo jammy ;;
sbatch*) echo 4711 ;;
esac
code=$?
for argument in "$@"; do
  # A host: what is sent by ssh is run here, in a home folder of its own.
  if [[ $argument == --command=* && -d $FAKE/home ]]; then
    HOME=$FAKE/home bash -c "${argument#--command=}"
    code=$?
  fi
done
exit "$code"
