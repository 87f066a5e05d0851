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

{{- define "headway-epp.backend" -}}
{{- dig "leader" "backend" (ternary "kubernetes-lease" "memory" (gt (int .Values.replicas) 1)) .Values.config -}}
{{- end }}

{{- define "headway-epp.toml" -}}
{{- $backend := include "headway-epp.backend" . -}}
{{- if and (eq $backend "memory") (gt (int .Values.replicas) 1) -}}
{{- fail "config.leader.backend: with 'memory' a picker is alone, and replicas is more than 1" -}}
{{- end -}}
{{- $ours := dict "discovery" (dict "pool" .Values.pool.name) "leader" (dict "backend" $backend) -}}
{{- toToml (mergeOverwrite (deepCopy .Values.config) $ours) -}}
{{- end }}
