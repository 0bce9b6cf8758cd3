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
Who holds what: a JSON list of groups of pod names. Every expert of every layer is held by each pod of some group; a
router can serve as soon as one pod of every group is ready. Fails for an expert that nobody holds.
*/}}
{{- define "grokmoe.holders" -}}
{{- $root := . }}
{{- $service := printf "%s-experts" (include "grokmoe.fullname" .) }}
{{- $holders := dict }}
{{- range $pool := .Values.experts.pools }}
{{- range $ordinal, $spec := $pool.pods }}
{{- $names := list }}
{{- range $copy := until (int (default 1 $pool.copies)) }}
{{- $set := include "grokmoe.experts.fullname" (dict "root" $root "pool" $pool "copy" $copy) }}
{{- $names = append $names (printf "%s-%d.%s" $set $ordinal $service) }}
{{- end }}
{{- range $group := splitList "+" $spec }}
{{- $parts := splitList "@" $group }}
{{- $layers := gt (len $parts) 1 | ternary (last $parts) "all" }}
{{- $limits := $root.Values.model }}
{{- range $layer := include "grokmoe.numbers" (dict "text" $layers "limit" $limits.numLayers "what" "layer" "spec" $spec) | fromJsonArray }}
{{- range $expert := include "grokmoe.numbers" (dict "text" (first $parts) "limit" $limits.numExperts "what" "expert" "spec" $spec) | fromJsonArray }}
{{- $key := printf "%d/%d" (int $layer) (int $expert) }}
{{- $_ := set $holders $key (concat (default list (get $holders $key)) $names | uniq) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- $groups := list }}
{{- range $layer := until (int .Values.model.numLayers) }}
{{- range $expert := until (int $root.Values.model.numExperts) }}
{{- $names := get $holders (printf "%d/%d" $layer $expert) }}
{{- if not $names }}
{{- fail (printf "experts.pools: nobody holds expert %d in layer %d" $expert $layer) }}
{{- end }}
{{- $groups = append $groups (join "," $names) }}
{{- end }}
{{- end }}
{{- $groups | uniq | toJson }}
{{- end }}

{{/*
Layers of the stages of each pipeline of attention workers, as a JSON list; empty: each worker has all layers. Fails when
they do not follow one another from the model's first layer to its last.
*/}}
{{- define "grokmoe.stages" -}}
{{- $next := 0 }}
{{- range $layers := .Values.attention.stageLayers }}
{{- $ends := splitList "-" $layers }}
{{- if or (ne (int (first $ends)) $next) (lt (int (last $ends)) $next) }}
{{- fail (printf "attention.stageLayers: %q must begin with layer %d" $layers $next) }}
{{- end }}
{{- $next = int (add1 (int (last $ends))) }}
{{- end }}
{{- if and .Values.attention.stageLayers (ne $next (int .Values.model.numLayers)) }}
{{- fail (printf "attention.stageLayers: must end with layer %d, the model's last" (sub (int .Values.model.numLayers) 1)) }}
{{- end }}
{{- toJson .Values.attention.stageLayers }}
{{- end }}

{{/* Name of a StatefulSet of attention workers. Takes (dict "root" $ "cell" NUMBER "stage" NUMBER), without "stage" for whole ones. */}}
{{- define "grokmoe.attention.fullname" -}}
{{- printf "%s-attention-%d" (include "grokmoe.fullname" .root) (int .cell) }}
{{- if hasKey . "stage" }}{{ printf "-stage-%d" (int .stage) }}{{ end }}
{{- end }}

{{/*
Where a router finds its attention workers: a name for whole ones; the pods of each pipeline, one by one, since a name
cannot say which belong together. Takes (dict "root" $ "cell" NUMBER).
*/}}
{{- define "grokmoe.attention.addresses" -}}
{{- $root := .root }}
{{- $cell := .cell }}
{{- $service := include "grokmoe.attention.fullname" (dict "root" $root "cell" $cell) }}
{{- $port := int $root.Values.ports.attention.grpc }}
{{- $stages := include "grokmoe.stages" $root | fromJsonArray }}
{{- if $stages }}
{{- $pipelines := list }}
{{- range $ordinal := until (int $root.Values.attention.replicas) }}
{{- $addresses := list }}
{{- range $stage, $layers := $stages }}
{{- $set := include "grokmoe.attention.fullname" (dict "root" $root "cell" $cell "stage" $stage) }}
{{- $addresses = append $addresses (printf "%s-%d.%s:%d" $set $ordinal $service $port) }}
{{- end }}
{{- $pipelines = append $pipelines (join "+" $addresses) }}
{{- end }}
{{- join "," $pipelines }}
{{- else }}
{{- printf "dns:///%s:%d" $service $port }}
{{- end }}
{{- end }}
