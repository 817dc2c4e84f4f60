#!/bin/sh
# run.sh [wrapper ...] CHECKS: the tests, once for every instruction set of this machine. Those that have fused
# multiply-add must give the same bits.
for checks; do :; done # the last argument
log=$(dirname "$checks")/checks.log
: > "$log"
status=0
for wanted in avx512 avx2 neon portable; do
  PROBMOE_ISA=$wanted
  export PROBMOE_ISA
  # Through the wrapper as well: valgrind's processor has fewer instruction sets.
  [ "$("$@" --instruction-set)" = "$wanted" ] || continue
  "$@" > "$log.part" || status=1
  cat "$log.part" >> "$log"
  sed '$d' "$log.part"
  echo "$wanted: $(tail -n 1 "$log.part")"
done
rm -f "$log.part"
awk -v status=$status '
  $2 == "bits" && $1 != "portable:" { if (bits && bits != $3) { print "instruction sets differ in bits"; ++failed } else ++passed; bits = $3 }
  / passed, .* failed$/ { passed += $1; failed += $3 }
  END {
    if (status && !failed) { print "a run ended early"; failed = 1 }
    if (!passed) failed += !failed
    printf "%d passed, %d failed\n", passed, failed
    exit failed > 0
  }' "$log"
