{{- define "headway-epp.name" -}}
{{- printf "%s-epp" .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{- define "headway-epp.selector" -}}
app.kubernetes.io/name: headway-epp
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "headway-epp.labels" -}}
{{ include "headway-epp.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "headway-epp.toml" -}}
{{- $ours := dict "discovery" (dict "pool" .Values.pool.name) -}}
{{- toToml (mergeOverwrite (deepCopy .Values.config) $ours) -}}
{{- end }}
