{{- define "grokmoe.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "grokmoe.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "grokmoe.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "grokmoe.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Labels that a selector may use. Takes (dict "root" $ "component" NAME). */}}
{{- define "grokmoe.selector" -}}
app.kubernetes.io/name: {{ include "grokmoe.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "grokmoe.labels" -}}
{{ include "grokmoe.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* Takes (dict "root" $ "accelerator" "cpu"|"cuda"). */}}
{{- define "grokmoe.image" -}}
{{- $image := .root.Values.image }}
{{- printf "%s:%s" $image.repository (default (printf "%s-%s" .root.Chart.AppVersion .accelerator) $image.tag) }}
{{- end }}

{{- define "grokmoe.workers.serverSecret" -}}
{{- default (printf "%s-workers-tls" (include "grokmoe.fullname" .)) .Values.tls.workers.serverSecret }}
{{- end }}
{{- define "grokmoe.workers.clientSecret" -}}
{{- default (printf "%s-workers-client-tls" (include "grokmoe.fullname" .)) .Values.tls.workers.clientSecret }}
{{- end }}
{{- define "grokmoe.clients.secret" -}}
{{- default (printf "%s-clients-tls" (include "grokmoe.fullname" .)) .Values.tls.clients.secret }}
{{- end }}
