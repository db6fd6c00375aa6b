//! Templates by name, for models that have none. They mark what the assistant says.

/// Name and text, the most common first.
const TEMPLATES: [(&str, &str); 7] = [
    ("chatml", include_str!("templates/chatml.jinja")),
    ("llama3", include_str!("templates/llama3.jinja")),
    ("llama2", include_str!("templates/llama2.jinja")),
    ("mistral", include_str!("templates/mistral.jinja")),
    ("gemma", include_str!("templates/gemma.jinja")),
    ("phi3", include_str!("templates/phi3.jinja")),
    ("zephyr", include_str!("templates/zephyr.jinja")),
];

pub(super) fn find(name: &str) -> Option<&'static str> {
    TEMPLATES.iter().find(|(known, _)| *known == name).map(|(_, source)| *source)
}

pub(crate) fn names() -> String {
    TEMPLATES.map(|(name, _)| name).join(", ")
}
