use super::*;
use serde_json::{Value as Json, json};

fn conversation(messages: Json) -> Conversation {
    Conversation::new(messages.as_array().unwrap()).unwrap()
}

fn talk() -> Conversation {
    conversation(json!([{"role": "system", "content": "s"}, {"role": "user", "content": "u\u{e9}"},
        {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"}, {"role": "assistant", "content": "b"}]))
}

fn template(source: &str) -> Result<Template, String> {
    Template::parse("t.jinja", source, BTreeMap::from([("bos_token".into(), "<s>".into())]))
        .map_err(|e| e.to_string())
}

fn render_with(source: &str, conversation: &Conversation, ending: Ending) -> Result<Rendered, String> {
    let rendered = template(source)?.render(conversation, ending, OffsetDateTime::UNIX_EPOCH);
    rendered.map_err(|e| e.to_string())
}

fn render(source: &str) -> Result<String, String> {
    render_with(source, &talk(), Ending::Complete).map(|rendered| rendered.text)
}

#[track_caller]
fn fails(source: &str, parts: &[&str]) {
    let said = render(source).unwrap_err();
    for part in parts {
        assert!(said.contains(part), "{source}: {said}");
    }
    assert!(
        said.starts_with("chat template t.jinja") && said.contains("; ") && !said.contains('\n'),
        "{said}"
    );
}

#[test]
fn what_is_wrong_is_said_with_line_and_message() {
    fails("{% if x %}", &["t.jinja, line 1: it is no template: "]);
    fails("\n\n{{ messages | nosuch }}", &["line 3: ", "unknown filter", "nosuch"]);
    fails("{{ 'a' is nosuch }}", &["line 1: ", "unknown test", "nosuch"]);
    fails("{{ nosuch(1) }}", &["line 1: ", "unknown function", "nosuch"]);
    fails("{{ 'a'.nosuch() }}", &["line 1: ", "unknown method", "nosuch"]);
    fails("a\n{{ missing.x }}", &["line 2: at messages[0] (role system): `missing` is undefined"]);
    fails("{{ nosuch | upper }}{% include 'x' %}", &["line 1: it is no template"]);
    fails(
        "{% for m in messages %}\n{% if m.content == 'v' %}{{ raise_exception('no\\n' ~ m.role) }}{% endif %}{% endfor %}",
        &[
            "line 2: at messages[3] (role user): it refuses the conversation: no user; change the conversation",
        ],
    );
    fails(
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.thinking.x }}{% endif %}{% endfor %}",
        &["at messages[1] (role user): `m.thinking` is undefined"],
    );
    let long = render(&format!("{{{{ raise_exception('{}') }}}}", "x".repeat(4000))).unwrap_err();
    assert!(long.len() < 800, "{long}");
}

#[test]
fn a_role_that_the_template_does_not_know_is_named() {
    let source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}";
    let said = |role: &str| {
        let other =
            conversation(json!([{"role": "user", "content": "u"}, {"role": role, "content": "hello"}]));
        render_with(source, &other, Ending::Complete).map(|rendered| rendered.text)
    };
    assert_eq!(said("user").unwrap(), "uhello");
    let error = said("human").unwrap_err();
    assert!(
        error.contains("at messages[1] (role human): the template writes nothing of this message"),
        "{error}"
    );
}

#[test]
fn an_answer_that_is_continued_stays_open() {
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}";
    let open = |source: &str, text: Json| {
        let talk =
            conversation(json!([{"role": "user", "content": "u"}, {"role": "assistant", "content": text}]));
        render_with(source, &talk, Ending::Open).map(|rendered| rendered.text)
    };
    assert_eq!(open(source, json!("It is ")).unwrap(), "<user>u</>\n<assistant>It is ");
    let trimmed = source.replace("m.content", "m.content | trim");
    assert_eq!(open(&trimmed, json!("It is ")).unwrap(), "<user>u</>\n<assistant>It is");
    let blocks = source.replace("m.content }}", "m.content if m.content is string else m.content[0].text }}");
    assert_eq!(open(&blocks, json!([{"type": "text", "text": "so"}])).unwrap(), "<user>u</>\n<assistant>so");
    let error = open(source, json!([{"type": "image"}])).unwrap_err();
    assert!(error.contains("at messages[1] (role assistant): there is no text to continue"), "{error}");
    let error = open("{% for m in messages %}{{ m.content | upper }}{% endfor %}", json!("hi")).unwrap_err();
    assert!(error.contains("changes what the last message says"), "{error}");
}

#[test]
fn generation_blocks_give_spans_and_those_whose_place_is_not_known_are_refused() {
    let source = "{{ bos_token }}{% for m in messages %}\n{{ m.role }}\u{20ac}{% if m.role == 'assistant' %}{% generation %}[{{ m.content }}]{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    let Rendered { text, assistant } = render_with(source, &talk(), Ending::Complete).unwrap();
    let said: Vec<&str> = assistant.iter().map(|span| &text[span.clone()]).collect();
    assert_eq!(said, ["[a]", "[b]"], "{text}");
    let source = "{% macro m() %}\n{% generation %}abc{% endgeneration %}{% endmacro %}{{ m() ~ m() }}";
    assert_eq!(render(source).unwrap(), "abcabc");
    let said =
        template(source).unwrap().render_marked(&talk(), OffsetDateTime::UNIX_EPOCH).unwrap_err().to_string();
    assert!(said.contains("t.jinja, line 2: a generation block in a macro"), "{said}");
}

#[test]
fn without_generation_blocks_spans_come_from_the_texts_of_other_conversations() {
    let spans = |source: &str| {
        let marked = template(source).unwrap().render_marked(&talk(), OffsetDateTime::UNIX_EPOCH);
        let Rendered { text, assistant } = marked.map_err(|e| e.to_string())?;
        Ok::<Vec<String>, String>(assistant.into_iter().map(|span| text[span].to_owned()).collect())
    };
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    assert_eq!(spans(source).unwrap(), ["a</>", "b</>"]);
    let differs = source.replace("</>", "{% if loop.last %}</>{% endif %}");
    let error = spans(&differs).unwrap_err();
    assert!(error.contains("at messages[2] (role assistant): where this answer stands"), "{error}");
    assert!(error.contains("choose a template with generation blocks"), "{error}");
}

/// Lists within lists, twice, and what is done with them; ranges have at most 100,000 numbers.
fn deep(then: &str, levels: usize) -> String {
    let outer = levels.div_ceil(50_000);
    format!(
        "{{% set ns = namespace(x=[], y=[]) %}}{{% for a in range({outer}) %}}{{% for b in range(50000) %}}{{% set ns.x = [ns.x] %}}\
         {{% set ns.y = [ns.y] %}}{{% endfor %}}{{% endfor %}}{then}"
    )
}

/// A large text that is looked through again and again.
fn in_loop(expression: &str) -> String {
    format!(
        "{{% set x = 'b' * 9999999 %}}{{% set y = 'b' * 9999999 %}}{{% for i in range(100000) %}}{{% set z = {expression} %}}{{% endfor %}}"
    )
}

#[test]
fn a_hostile_template_ends_with_one_line() {
    let plain = [
        (
            "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
            "computes for more",
        ),
        ("{% for a in range(99999999999) %}{% endfor %}", ""),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
            "",
        ),
        ("{{ 'ab' * 999999999999 }}", ""),
        ("{{ 'x'.replace('', 'y' * 1000000) }}{{ 'a'.join('b' * 99999999) }}", ""),
        ("{{ '%099999999d' | format(1) }}", ""),
        ("{{ '{:>99999999999}'.format('a') }}", "a width of more than 4 digits"),
        ("{{ messages | tojson(indent=99999999) }}", "cannot indent"),
        ("{{ strftime_now('%Y' * 9999) }}", "has a format of"),
    ];
    let made = [
        (deep("{{ ns.x | tojson }}", 50_000), "100 deep"),
        (deep("{{ ns.x }}", 50_000), ""),
        (deep("{{ ns.x == ns.y }}{{ [ns.x] | unique }}{{ [ns.x, ns.y] | sort }}", 50_000), ""),
        (deep("{{ ns.x }}", 10_000_000), "computes for more"),
        (in_loop("x.find('c')"), "computes for more"),
        (in_loop("x | length"), "computes for more"),
        (in_loop("x | trim"), "computes for more"),
        (in_loop("'c' in x"), "computes for more"),
    ];
    for (source, part) in plain.map(|(source, part)| (source.to_owned(), part)).into_iter().chain(made) {
        match render(&source) {
            Ok(text) => assert!(part.is_empty() && text.len() <= RENDERED_MAX, "{source}"),
            Err(said) => assert!(said.contains(part) && !said.contains('\n'), "{source}: {said}"),
        }
    }
    for nested in ["(", "[", "{{ -", "{% if x %}", "{{ not ", "{{ x[", "{% for x in y %}", "{{ {1:"] {
        let _ = render(&nested.repeat(50_000));
        let _ = render(&format!("{{{{ {}", nested.repeat(50_000)));
    }
    let said = template(&"x".repeat(TEMPLATE_MAX + 1)).err().unwrap();
    assert!(said.contains("it has 1048577 bytes; the most is 1048576"), "{said}");
}

/// Pieces of templates in any order: nothing panics, and what fails says so in one line.
#[test]
fn no_text_of_a_template_panics() {
    const PIECES: [&str; 40] = [
        "{{ ",
        " }}",
        "{% ",
        " %}",
        "{%- ",
        " -%}",
        "{# ",
        " #}",
        "if ",
        "else",
        "endif",
        "for x in ",
        "endfor",
        "messages",
        "message",
        "generation",
        "endgeneration",
        "set x = ",
        "macro m(x)",
        "endmacro",
        "m(1)",
        "|tojson",
        "|trim",
        "|join(',')",
        "[0]",
        "[::-1]",
        ".content",
        ".split('a')[-1]",
        ".items()",
        "'\\u00e9'",
        "\"",
        "'",
        "1e999",
        " is defined",
        " ~ ",
        "\u{e9}\n",
        "namespace(a=1)",
        "raise_exception('x')",
        "{% raw %}",
        "{% break %}",
    ];
    use proptest::prelude::*;
    let texts = proptest::collection::vec(proptest::sample::select(PIECES.to_vec()), 0..40);
    proptest!(ProptestConfig::with_cases(2000), |(pieces in texts)| {
        if let Err(said) = render(&pieces.concat()) {
            prop_assert!(!said.contains('\n'), "{said}");
        }
    });
    proptest!(ProptestConfig::with_cases(500), |(text in "\\PC{0,200}")| {
        let _ = render(&text);
    });
}
