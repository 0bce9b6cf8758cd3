{{/*
Numbers that a list of the worker's grammar names, as JSON: "0-2,5" is [0,1,2,5].
Takes (dict "text" LIST "limit" COUNT "what" NAME "spec" WHOLE).
*/}}
{{- define "grokmoe.numbers" -}}
{{- $numbers := list }}
{{- range $part := splitList "," .text }}
{{- if eq (trim $part) "all" }}
{{- $numbers = concat $numbers (until (int $.limit)) }}
{{- else }}
{{- $ends := splitList "-" (trim $part) }}
{{- $last := int (last $ends) }}
{{- if ge $last (int $.limit) }}
{{- fail (printf "experts.pools: %q names %s %d, the model has %d" $.spec $.what $last (int $.limit)) }}
{{- end }}
{{- if gt (int (first $ends)) $last }}
{{- fail (printf "experts.pools: %q: the range %q is empty" $.spec $part) }}
{{- end }}
{{- $numbers = concat $numbers (untilStep (int (first $ends)) (int (add1 $last)) 1) }}
{{- end }}
{{- end }}
{{- toJson $numbers }}
{{- end }}

{{/* Name of the StatefulSet that is one copy of a pool. Takes (dict "root" $ "pool" POOL "copy" NUMBER). */}}
{{- define "grokmoe.experts.fullname" -}}
{{- printf "%s-experts-%s-%d" (include "grokmoe.fullname" .root) .pool.name (int .copy) }}
{{- end }}

{{/*
Slices that a group of the worker's grammar names after its colon, as JSON {"of": COUNT, "numbers": [...]}; empty: none.
Takes (dict "text" SLICES "spec" WHOLE).
*/}}
{{- define "grokmoe.slices" -}}
{{- $parts := splitList "/" .text }}
{{- $of := int (last $parts) }}
{{- $numbers := untilStep 1 (int (add1 $of)) 1 }}
{{- if ne (first $parts) "all" }}
{{- $numbers = include "grokmoe.numbers" (dict "text" (first $parts) "limit" 1000 "what" "slice" "spec" .spec) | fromJsonArray }}
{{- end }}
{{- range $number := $numbers }}
{{- if or (lt (int $number) 1) (gt (int $number) $of) }}
{{- fail (printf "experts.pools: %q names slice %d, there are 1 to %d" $.spec (int $number) $of) }}
{{- end }}
{{- end }}
{{- dict "of" $of "numbers" $numbers | toJson }}
{{- end }}

{{/*
Who holds what: a JSON list of groups of pod names. A router can serve as soon as one pod of every group is ready: for
each expert of each layer there is a group of those that hold it, or one for each of its slices, and those that hold
it whole are in all of these. Fails for what nobody holds, and for an expert that is cut in two ways.
*/}}
{{- define "grokmoe.holders" -}}
{{- $root := . }}
{{- $service := printf "%s-experts" (include "grokmoe.fullname" .) }}
{{- $holders := dict }}
{{- $cuts := dict }}
{{- range $pool := .Values.experts.pools }}
{{- range $ordinal, $spec := $pool.pods }}
{{- $names := list }}
{{- range $copy := until (int (default 1 $pool.copies)) }}
{{- $set := include "grokmoe.experts.fullname" (dict "root" $root "pool" $pool "copy" $copy) }}
{{- $names = append $names (printf "%s-%d.%s" $set $ordinal $service) }}
{{- end }}
{{- range $group := splitList "+" $spec }}
{{- $parts := splitList "@" $group }}
{{- $words := splitList ":" (first $parts) }}
{{- $slices := dict "of" 1 "numbers" (list 1) }}
{{- if gt (len $words) 1 }}
{{- $slices = include "grokmoe.slices" (dict "text" (last $words) "spec" $spec) | fromJson }}
{{- end }}
{{- $layers := gt (len $parts) 1 | ternary (last $parts) "all" }}
{{- $limits := $root.Values.model }}
{{- range $layer := include "grokmoe.numbers" (dict "text" $layers "limit" $limits.numLayers "what" "layer" "spec" $spec) | fromJsonArray }}
{{- range $expert := include "grokmoe.numbers" (dict "text" (first $words) "limit" $limits.numExperts "what" "expert" "spec" $spec) | fromJsonArray }}
{{- $cell := printf "%d/%d" (int $layer) (int $expert) }}
{{- if gt (int $slices.of) 1 }}
{{- if ne (int (default $slices.of (get $cuts $cell))) (int $slices.of) }}
{{- fail (printf "experts.pools: expert %d of layer %d is cut into %d and into %d" (int $expert) (int $layer) (int (get $cuts $cell)) (int $slices.of)) }}
{{- end }}
{{- $_ := set $cuts $cell (int $slices.of) }}
{{- end }}
{{- range $slice := $slices.numbers }}
{{- $key := printf "%s/%d" $cell (gt (int $slices.of) 1 | ternary (int $slice) 0) }}
{{- $_ := set $holders $key (concat (default list (get $holders $key)) $names | uniq) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- $groups := list }}
{{- range $layer := until (int .Values.model.numLayers) }}
{{- range $expert := until (int $root.Values.model.numExperts) }}
{{- $cell := printf "%d/%d" $layer $expert }}
{{- $whole := default list (get $holders (printf "%s/0" $cell)) }}
{{- $of := int (default 1 (get $cuts $cell)) }}
{{- range $slice := gt $of 1 | ternary (untilStep 1 (int (add1 $of)) 1) (list 0) }}
{{- $names := concat $whole (default list (get $holders (printf "%s/%d" $cell (int $slice)))) | uniq }}
{{- if not $names }}
{{- fail (printf "experts.pools: nobody holds expert %d in layer %d%s" $expert $layer (gt $of 1 | ternary (printf ", slice %d/%d" (int $slice) $of) "")) }}
{{- end }}
{{- $groups = append $groups (join "," $names) }}
{{- end }}
{{- end }}
{{- end }}
{{- $groups | uniq | toJson }}
{{- end }}
