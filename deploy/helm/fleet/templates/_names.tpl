{{/* HOST:PORT,... of the coordinators from a number on, for what Kubernetes puts in the environment. */}}
{{- define "fleet.coordinators" -}}
{{- $port := .port -}}
{{- $hosts := list -}}
{{- range $n := untilStep (int .from) (int .values.coordinator.replicas) 1 -}}
{{- $hosts = append $hosts (printf "fleet-coordinator-%d.fleet-coordinators.$(NAMESPACE).svc:%d" $n (int $port)) -}}
{{- end -}}
{{- join "," $hosts -}}
{{- end -}}
