#!/bin/bash
# One training process on this host. It outlives the ssh session that started it, and is watched through files.
#
#   job.sh start FOLDER COPIES COMMAND...   starts COMMAND; copies of its log go to COPIES ("-": nowhere)
#   job.sh status FOLDER WORKDIR            prints what became of it, and the newest checkpoint
#   job.sh logs FOLDER LINES                prints the end of its log
#   job.sh stop FOLDER SECONDS              SIGTERM, and SIGKILL after SECONDS; it is not to be started again
#   job.sh kill FOLDER                      SIGKILL
#
# FOLDER holds: pid, supervisor, boot (of this machine, since process numbers come again), began, log, exit_code, halted.
set -euo pipefail
verb=$1 folder=$2
shift 2
name=$(hostname)-$(basename "$folder")
exec {never}<> <(:) # reading from it waits without starting a process

pause() { read -rt "$1" -u "$never" _ || true; }
boot() { cat /proc/sys/kernel/random/boot_id; }
# The training itself, or the shell that is about to write down how it ended.
alive() {
  [[ -s $folder/pid && $(cat "$folder/boot") == "$(boot)" ]] &&
    { kill -0 "$(cat "$folder/pid")" || kill -0 "$(cat "$folder/supervisor")"; } 2>/dev/null
}
running() { [[ ! -e $folder/exit_code ]] && alive; }
wait_for_end() { # seconds
  for ((i = 0; i < 10 * $1; i++)); do
    running || return 0
    pause 0.1
  done
  return 1
}

case $verb in
start)
  mkdir -p "$folder"
  if running; then
    echo "$name: process $(cat "$folder/pid") of this run is still there; stop it first." >&2
    exit 1
  fi
  rm -f "$folder/pid" "$folder/exit_code" "$folder/halted"
  setsid --fork bash "$0" supervise "$folder" "$@" </dev/null >>"$folder/log" 2>&1
  for ((i = 0; i < 100; i++)); do
    [[ -s $folder/pid ]] && break
    pause 0.1
  done
  echo "$name: started, process $(cat "$folder/pid")"
  ;;
supervise)
  copies=$1
  shift
  cd "$(dirname "$0")/../.."
  echo "=== $(date -u +%FT%TZ) $*"
  boot >"$folder/boot"
  echo $$ >"$folder/supervisor"
  "$@" &
  child=$!
  echo "$child" >"$folder/pid.part" && mv "$folder/pid.part" "$folder/pid"
  # A machine that replaces a preempted one has its name, and a new log that must not take the place of the old copy.
  [[ -s $folder/began ]] || echo "$(date -u +%Y%m%dT%H%M%SZ)-$$" >"$folder/began"
  copied=$name-$(cat "$folder/began").log
  copy() { [[ $copies == - ]] || { mkdir -p "$copies" && cp "$folder/log" "$copies/$copied"; } || true; }
  while true; do
    pause 60
    copy
  done &
  copier=$!
  code=0
  wait "$child" || code=$?
  kill "$copier"
  echo "=== $(date -u +%FT%TZ) exit code $code"
  copy
  echo "$code" >"$folder/exit_code.part" && mv "$folder/exit_code.part" "$folder/exit_code"
  ;;
status)
  living=no # asked first: what is not alive any more has written its exit code by now
  if alive; then living=yes; fi
  if [[ -e $folder/exit_code && -e $folder/halted ]]; then
    state="halted $(cat "$folder/exit_code")"
  elif [[ -e $folder/exit_code ]]; then
    state="exited $(cat "$folder/exit_code")"
  elif [[ $living == yes ]]; then
    state=running
  elif [[ -e $folder/pid ]]; then
    state=died
  else
    state=none
  fi
  echo "densevit-host ${name//[[:space:]]/_} $state"
  newest=$(find "$1/checkpoints" -maxdepth 1 -regex '.*/[0-9]+' -printf '%f %T@\n' 2>/dev/null | sort -n | tail -n 1) || true
  if [[ -n $newest ]]; then
    seconds=${newest#* }
    echo "densevit-step ${newest% *} $(($(date +%s) - ${seconds%.*}))"
  fi
  ;;
logs)
  echo "--- $name"
  tail -n "$1" "$folder/log" 2>/dev/null || echo "nothing yet"
  ;;
stop)
  if running; then
    touch "$folder/halted"
    kill -TERM "$(cat "$folder/pid")" 2>/dev/null || true
    wait_for_end "$1" || kill -KILL "$(cat "$folder/pid")" 2>/dev/null || true
    wait_for_end 10 || true
  fi
  ;;
kill)
  if running; then
    kill -KILL "$(cat "$folder/pid")" 2>/dev/null || true
    wait_for_end 10 || true
  fi
  ;;
*)
  echo "job.sh knows no $verb" >&2
  exit 2
  ;;
esac
