{{/* Flags from a map of them. Whole numbers are written without an exponent. */}}
{{- define "grokmoe.flags" -}}
{{- range $name, $value := . }}
{{- if kindIs "bool" $value }}
- {{ $value | ternary (printf "--%s" $name) (printf "--no-%s" $name) }}
{{- else if and (kindIs "float64" $value) (eq (floor $value) $value) }}
- {{ printf "--%s=%d" $name (int64 $value) }}
{{- else }}
- {{ printf "--%s=%v" $name $value | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Folder of the checkpoint in the pod. */}}
{{- define "grokmoe.modelPath" -}}
{{- if eq .Values.model.source "demo" -}}
/opt/grokmoe/demo_model
{{- else -}}
{{ list "/models" .Values.model.path | join "/" | trimSuffix "/" }}
{{- end }}
{{- end }}

{{/* What every role has: addresses, probes' port, metrics, end. Takes (dict "root" $ "ports" PORTS "grace" SECONDS). */}}
{{- define "grokmoe.serverArgs" -}}
{{- $host := .root.Values.listenHost -}}
- {{ default (printf "%s:%d" $host (int .ports.grpc)) .listen | printf "--listen=%s" | quote }}
- {{ printf "--health-listen=%s:%d" $host (int .ports.health) | quote }}
- {{ $host | trimPrefix "[" | trimSuffix "]" | printf "--metrics-host=%s" | quote }}
- --metrics-port={{ .ports.metrics }}
- --grace={{ .grace }}
- --log-format={{ .root.Values.logFormat }}
{{- with .root.Values.tracing.url }}
- --traces={{ . }}
{{- end }}
{{- end }}

{{/* Whether rows go to expert workers beside gRPC, by gloo or NCCL: "true" or empty. */}}
{{- define "grokmoe.hasPairs" -}}
{{- index .Values.router.settings "expert-transport" | default "grpc" | ne "grpc" | ternary "true" "" }}
{{- end }}

{{/* Where spans go, as a rule of egress; empty: nowhere, or tracing.collector is everybody's. */}}
{{- define "grokmoe.tracingEgress" -}}
{{- with .Values.tracing }}
{{- if .url }}
{{- $host := (urlParse .url).host }}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
- ports: [{port: {{ contains ":" $host | ternary (splitList ":" $host | last) "4317" }}, protocol: TCP}]
  {{- with .collector }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* What a worker shows to the router, and wants to see of it. */}}
{{- define "grokmoe.workerSecurityArgs" -}}
{{- if .Values.tls.workers.enabled }}
- --tls-certificate=/etc/grokmoe/workers-tls/tls.crt
- --tls-key=/etc/grokmoe/workers-tls/tls.key
- --tls-client-ca=/etc/grokmoe/workers-tls/ca.crt
{{- end }}
{{- if .Values.tokens.clusterSecret }}
- --tokens-file=/etc/grokmoe/cluster-tokens/tokens
{{- end }}
{{- end }}

{{/*
Probes of a role. The kubelet asks on the port of health, which is in the clear also with TLS. Only `""` counts for
life, so that the loss of a peer never restarts anybody; the service's own name is what traffic depends on.
Takes (dict "port" NUMBER "service" NAME "budget" SECONDS "start" SERVICE).
*/}}
{{- define "grokmoe.probes" -}}
startupProbe:
  grpc: {port: {{ .port }}, service: {{ .start | quote }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add .budget 4) 5 }}
livenessProbe:
  grpc: {port: {{ .port }}, service: ""}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  grpc: {port: {{ .port }}, service: {{ .service | quote }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
{{- end }}

{{- define "grokmoe.ports" -}}
{{- range $name := list "grpc" "health" "metrics" }}
{{- with get $ $name }}
- {name: {{ $name }}, containerPort: {{ . }}}
{{- end }}
{{- end }}
{{- end }}

{{/* How a container ends: taken out of the Services first, while it still serves. */}}
{{- define "grokmoe.drain" -}}
lifecycle:
  preStop:
    sleep: {seconds: {{ . }}}
{{- end }}

{{/* Fields of every pod. Takes (dict "root" $ "component" NAME "of" VALUES). */}}
{{- define "grokmoe.pod" -}}
serviceAccountName: {{ include "grokmoe.fullname" .root }}
automountServiceAccountToken: false
# Service links would make variables such as GROKMOE_PORT, which the roles read as settings.
enableServiceLinks: false
securityContext: {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .of.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Resources, with the GPUs among the limits. */}}
{{- define "grokmoe.resources" -}}
{{- $resources := deepCopy (default dict .resources) }}
{{- with .gpu }}
{{- if .count }}
{{- $_ := set $resources "limits" (merge (dict (default "nvidia.com/gpu" .resource) (int .count)) (default dict $resources.limits)) }}
{{- end }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* Mounts that every role has. */}}
{{- define "grokmoe.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if ne .Values.model.source "demo" }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}
{{- define "grokmoe.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: {{ .Values.tmpSize }}}
{{- if ne .Values.model.source "demo" }}
- name: model
  persistentVolumeClaim: {claimName: {{ eq .Values.model.source "claim" | ternary .Values.model.claim (printf "%s-model" (include "grokmoe.fullname" .)) }}, readOnly: true}
{{- end }}
{{- if eq .Values.model.source "download" }}
- name: checksums
  configMap: {name: {{ include "grokmoe.checksums" . }}}
{{- end }}
{{- end }}
{{- define "grokmoe.workerMounts" -}}
{{- if .Values.tls.workers.enabled }}
- {name: workers-tls, mountPath: /etc/grokmoe/workers-tls, readOnly: true}
{{- end }}
{{- if .Values.tokens.clusterSecret }}
- {name: cluster-tokens, mountPath: /etc/grokmoe/cluster-tokens, readOnly: true}
{{- end }}
{{- end }}
{{- define "grokmoe.workerVolumes" -}}
{{- if .Values.tls.workers.enabled }}
- name: workers-tls
  secret: {secretName: {{ include "grokmoe.workers.serverSecret" . }}, defaultMode: 0440}
{{- end }}
{{- if .Values.tokens.clusterSecret }}
- name: cluster-tokens
  secret:
    secretName: {{ .Values.tokens.clusterSecret }}
    defaultMode: 0440
    items: [{key: tokens, path: tokens}]
{{- end }}
{{- end }}

{{/* A checkpoint that is still being fetched is waited for. */}}
{{- define "grokmoe.awaitWeights" -}}
{{- if eq .Values.model.source "download" }}
- name: await-weights
  image: {{ include "grokmoe.image" (dict "root" . "accelerator" "cpu") }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  args: [await-weights, --checksums=/etc/grokmoe/checksums/checksums, --folder={{ include "grokmoe.modelPath" . }}]
  securityContext: {{- toYaml .Values.securityContext | nindent 4 }}
  resources: {{- toYaml (dict "requests" (dict "cpu" "10m" "memory" "64Mi") "limits" (dict "memory" "128Mi")) | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: model, mountPath: /models, readOnly: true}
    - {name: checksums, mountPath: /etc/grokmoe/checksums, readOnly: true}
{{- end }}
{{- end }}

{{/* The attention worker; in a StatefulSet of its own, or beside its router. Takes (dict "root" $ "listen" ADDRESS). */}}
{{- define "grokmoe.attentionContainer" -}}
{{- $attention := .root.Values.attention -}}
{{- $ports := .root.Values.ports.attention -}}
- name: attention
  image: {{ include "grokmoe.image" (dict "root" .root "accelerator" (gt (int $attention.gpu.count) 0 | ternary "cuda" "cpu")) }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  args:
    - attention-worker
    - --model={{ include "grokmoe.modelPath" .root }}
    - --variant={{ .root.Values.model.variant }}
    - --dtype={{ .root.Values.model.dtype }}
    - --device={{ $attention.device }}
    - --kv-gib={{ $attention.kvGib }}
    {{- with .layers }}
    - --layers={{ . }}
    {{- end }}
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
{{- define "grokmoe.shmVolume" -}}
{{- if . }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ . }}}
{{- end }}
{{- end }}

{{/* Spread over zones. Takes (dict "root" $ "component" NAME). */}}
{{- define "grokmoe.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ .root.Values.spread.topologyKey }}
    whenUnsatisfiable: {{ .root.Values.spread.whenUnsatisfiable }}
    labelSelector:
      matchLabels: {{- include "grokmoe.selector" . | nindent 8 }}
{{- end }}
