{{- define "onebasis.labels" -}}
app.kubernetes.io/name: onebasis
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "onebasis.selector" -}}
app.kubernetes.io/name: onebasis
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: control-plane
{{- end }}

{{- define "onebasis.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* The settings of the values, and what follows from the rest of the chart. */ -}}
{{- define "onebasis.settings" -}}
{{- $own := dict
  "state_dir" "/var/lib/onebasis/state"
  "ray" (dict "address" (printf "%s-ray-head-svc:6379" .Release.Name) "auth_token_path" "/etc/onebasis/ray/auth_token")
-}}
{{- merge $own (deepCopy .Values.settings) | toYaml -}}
{{- end }}

{{- define "onebasis.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "onebasis.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{- /* What every process needs that reads or writes the bucket or loads a base model. */ -}}
{{- define "onebasis.env" -}}
{{- if .Values.secrets.s3 }}
- {name: AWS_SHARED_CREDENTIALS_FILE, value: /etc/onebasis/s3/credentials}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "onebasis.mounts" -}}
{{- if .Values.secrets.s3 }}
- {name: s3, mountPath: /etc/onebasis/s3, readOnly: true}
{{- end }}
{{- if .Values.modelVolume }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{- define "onebasis.volumes" -}}
{{- if .Values.secrets.s3 }}
- {name: s3, secret: {secretName: {{ .Values.secrets.s3 }}}}
{{- end }}
{{- with .Values.modelVolume }}
- name: models
{{ toYaml . | indent 2 }}
{{- end }}
{{- end }}

{{- define "onebasis.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
{{ toYaml . | indent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
{{ toYaml . | indent 2 }}
{{- end }}
{{- end }}

{{- define "onebasis.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - {name: {{ . }}}
{{- end }}
{{- end }}
{{- end }}

{{- define "onebasis.scheme" -}}
{{ if .Values.settings.server.tls }}https{{ else }}http{{ end }}
{{- end }}
