{{/* Whether the ranks of an attention worker are a pod each. */}}
{{- define "grokmoe.hasGroups" -}}
{{- if and (gt (int .Values.attention.tensorParallel.ranks) 1) (eq .Values.attention.tensorParallel.shape "group") }}yes{{ end }}
{{- end }}

{{/*
How many ranks share out an attention worker, and where they meet if they are a pod each: LeaderWorkerSet's controller
puts its variables before those of the container, so that arguments can name them.
*/}}
{{- define "grokmoe.rankArgs" -}}
{{- $parallel := .Values.attention.tensorParallel }}
{{- if gt (int $parallel.ranks) 1 }}
- --tensor-parallel={{ $parallel.ranks }}
{{- if include "grokmoe.hasGroups" . }}
- --rank=$(LWS_WORKER_INDEX)
- --rendezvous=$(LWS_LEADER_ADDRESS):{{ $parallel.port }}
{{- else if and (hasPrefix "cuda" .Values.attention.device) (lt (int .Values.attention.gpu.count) (int $parallel.ranks)) }}
{{- fail (printf "attention.tensorParallel: %d ranks in one pod need as many cards, attention.gpu.count is %d" (int $parallel.ranks) (int .Values.attention.gpu.count)) }}
{{- end }}
{{- end }}
{{- end }}

{{/* What all ranks compute. */}}
{{- define "grokmoe.attentionArgs" -}}
- attention-worker
- --model={{ include "grokmoe.modelPath" . }}
- --variant={{ .Values.model.variant }}
- --dtype={{ .Values.model.dtype }}
- --device={{ .Values.attention.device }}
- --kv-gib={{ .Values.attention.kvGib }}
{{- with include "grokmoe.rankArgs" . | trim }}{{ nindent 0 . }}{{ end }}
{{- end }}

{{- define "grokmoe.attentionImage" -}}
{{ include "grokmoe.image" (dict "root" . "accelerator" (gt (int .Values.attention.gpu.count) 0 | ternary "cuda" "cpu")) }}
{{- end }}

{{/* The attention worker; in a pod of its own, or beside its router. Takes (dict "root" $ "listen" ADDRESS). */}}
{{- define "grokmoe.attentionContainer" -}}
{{- $attention := .root.Values.attention -}}
{{- $ports := .root.Values.ports.attention -}}
- name: attention
  image: {{ include "grokmoe.attentionImage" .root }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  args:
    {{- include "grokmoe.attentionArgs" .root | trim | nindent 4 }}
    {{- include "grokmoe.serverArgs" (dict "root" .root "ports" $ports "grace" $attention.grace "listen" .listen) | nindent 4 }}
    {{- with include "grokmoe.workerSecurityArgs" .root | trim }}{{ nindent 4 . }}{{ end }}
    {{- with include "grokmoe.flags" $attention.settings | trim }}{{ nindent 4 . }}{{ end }}
    {{- with $attention.extraArgs }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $attention.env }}
  env: {{- toYaml . | nindent 4 }}
  {{- end }}
  ports: {{- include "grokmoe.ports" (.listen | empty | ternary $ports (omit $ports "grpc")) | trim | nindent 4 }}
  {{- include "grokmoe.probes" (dict "port" $ports.health "service" "grokmoe.v1.Attention" "start" "grokmoe.v1.Attention" "budget" $attention.startupBudget) | nindent 2 }}
  {{- include "grokmoe.drain" $attention.drain | nindent 2 }}
  securityContext: {{- toYaml .root.Values.securityContext | nindent 4 }}
  resources: {{- include "grokmoe.resources" $attention | nindent 4 }}
  volumeMounts:
    {{- include "grokmoe.mounts" .root | nindent 4 }}
    {{- if .listen }}
    - {name: cell, mountPath: /run/grokmoe}
    {{- end }}
    {{- with include "grokmoe.workerMounts" .root | trim }}{{ nindent 4 . }}{{ end }}
    {{- if $attention.shm }}
    - {name: shm, mountPath: /dev/shm}
    {{- end }}
{{- end }}

{{/*
A rank but the first. It serves nobody, so there is nothing to probe: when it ends, so does its worker, and is made anew.
*/}}
{{- define "grokmoe.rankContainer" -}}
{{- $attention := .Values.attention -}}
- name: rank
  image: {{ include "grokmoe.attentionImage" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  args:
    {{- include "grokmoe.attentionArgs" . | trim | nindent 4 }}
    - --grace={{ $attention.grace }}
    - --log-format={{ .Values.logFormat }}
    {{- with include "grokmoe.flags" $attention.settings | trim }}{{ nindent 4 . }}{{ end }}
    {{- with $attention.extraArgs }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $attention.env }}
  env: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- include "grokmoe.drain" $attention.drain | nindent 2 }}
  securityContext: {{- toYaml .Values.securityContext | nindent 4 }}
  resources: {{- include "grokmoe.resources" $attention | nindent 4 }}
  volumeMounts:
    {{- include "grokmoe.mounts" . | nindent 4 }}
    {{- if $attention.shm }}
    - {name: shm, mountPath: /dev/shm}
    {{- end }}
{{- end }}

{{/* A pod of an attention worker. Takes (dict "root" $ "cell" NUMBER "component" "attention"|"attention-rank"). */}}
{{- define "grokmoe.attentionTemplate" -}}
{{- $attention := .root.Values.attention -}}
{{- $serves := eq .component "attention" -}}
metadata:
  labels: {{- include "grokmoe.labels" . | nindent 4 }}
    grokmoe/cell: {{ .cell | quote }}
    {{- with $attention.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $attention.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "grokmoe.pod" (dict "root" .root "of" $attention) | nindent 2 }}
  terminationGracePeriodSeconds: {{ add $attention.drain $attention.grace 10 }}
  {{- if $serves }}
  {{- include "grokmoe.spread" . | nindent 2 }}
  {{- end }}
  {{- with include "grokmoe.awaitWeights" .root | trim }}
  initContainers: {{- nindent 4 . }}
  {{- end }}
  containers:
    {{- if $serves }}
    {{- include "grokmoe.attentionContainer" (dict "root" .root "listen" "") | nindent 4 }}
    {{- else }}
    {{- include "grokmoe.rankContainer" .root | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "grokmoe.volumes" .root | nindent 4 }}
    {{- if $serves }}
    {{- with include "grokmoe.workerVolumes" .root | trim }}{{ nindent 4 . }}{{ end }}
    {{- end }}
    {{- with include "grokmoe.shmVolume" $attention.shm | trim }}{{ nindent 4 . }}{{ end }}
{{- end }}

{{/*
A rule for what ranks say to each other, over ports that the system draws. To find the first they ask for its name.
Takes (dict "root" $ "way" "from"|"to").
*/}}
{{- define "grokmoe.betweenRanks" -}}
- {{ .way }}:
    {{- range $component := list "attention" "attention-rank" }}
    - podSelector:
        matchLabels: {{- include "grokmoe.selector" (dict "root" $.root "component" $component) | nindent 10 }}
    {{- end }}
{{- if eq .way "to" }}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
{{- end }}
{{- end }}
