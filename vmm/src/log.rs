//! What a VMM says goes line by line to standard error, with the spans that it is said in.
//!
//! `tracing_subscriber` keeps spans in a slab for some thousand threads, which takes 54 KiB before anything is said. A VMM has few spans, and there
//! may be hundreds of VMMs that are otherwise alike; so spans are kept in a list here. Filters, fields and times are that crate's.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt::{self, Write as _},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tracing::{
    Event, Metadata, Subscriber,
    span::{Attributes, Id, Record},
};
use tracing_core::span::Current;
use tracing_subscriber::{
    field::RecordFields,
    filter::{LevelFilter, Targets},
    fmt::{
        FormatFields,
        format::{DefaultFields, Writer},
        time::{FormatTime, SystemTime},
    },
};

thread_local! {
    /// The spans that this thread is in, the innermost last.
    static INSIDE: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// Who says it.
pub(crate) struct Log<W> {
    filter: Targets,
    to: W,
    next: AtomicU64,
    spans: Mutex<BTreeMap<u64, Span>>,
}

/// A span that is not closed.
struct Span {
    metadata: &'static Metadata<'static>,
    /// What is said of the spans around it, as it was when this began: `vmm{pid=7}: `.
    around: String,
    fields: String,
    handles: usize,
}

impl Span {
    fn text(&self) -> String {
        let Self { around, fields, .. } = self;
        let name = self.metadata.name();
        match fields.is_empty() {
            true => format!("{around}{name}: "),
            false => format!("{around}{name}{{{fields}}}: "),
        }
    }
}

/// Where lines go, each in one piece.
pub(crate) trait Lines: Send + Sync + 'static {
    fn line(&self, line: &str);
}

/// Standard error.
pub(crate) struct StandardError;

impl Lines for StandardError {
    fn line(&self, line: &str) {
        vmm::terminal::say(line);
    }
}

impl<W: Lines> Log<W> {
    /// Says to `to` what the directives `asked` name, like `info,tarpc=warn`; without any that make sense, all that is of use to an operator.
    pub(crate) fn new(asked: Option<&str>, to: W) -> Self {
        let asked = asked.and_then(|asked| asked.parse().ok());
        Self {
            filter: asked.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO)),
            to,
            next: AtomicU64::new(1),
            spans: Mutex::default(),
        }
    }

    fn spans(&self) -> MutexGuard<'_, BTreeMap<u64, Span>> {
        // Each change to it is one step.
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is said of the span `id` and those around it.
    fn text_of(&self, id: Option<u64>) -> String {
        let spans = self.spans();
        let span = id.and_then(|id| spans.get(&id));
        span.map_or_else(String::new, Span::text)
    }

    fn write(&self, event: &Event<'_>) -> Result<String, fmt::Error> {
        let mut line = String::new();
        SystemTime.format_time(&mut Writer::new(&mut line))?;
        let metadata = event.metadata();
        let inside = match event.is_root() {
            true => None,
            false => event.parent().map(Id::into_u64).or_else(innermost),
        };
        let spans = self.text_of(inside);
        write!(
            line,
            " {:>5} {spans}{}: ",
            metadata.level(),
            metadata.target()
        )?;
        line.push_str(&fields(event)?);
        line.push('\n');
        Ok(line)
    }
}

impl<W: Lines> Subscriber for Log<W> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.filter
            .would_enable(metadata.target(), metadata.level())
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let inside = match span.is_root() {
            true => None,
            false => span.parent().map(Id::into_u64).or_else(innermost),
        };
        let new = Span {
            metadata: span.metadata(),
            around: self.text_of(inside),
            fields: fields(span).unwrap_or_default(),
            handles: 1,
        };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.spans().insert(id, new);
        // It began at one, and takes centuries to come to nought again.
        Id::from_u64(id.max(1))
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        let more = fields(values).unwrap_or_default();
        if let Some(span) = self.spans().get_mut(&span.into_u64()) {
            let between = if span.fields.is_empty() { "" } else { " " };
            span.fields += between;
            span.fields += &more;
        }
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        if let Ok(line) = self.write(event) {
            self.to.line(&line);
        }
    }

    fn enter(&self, span: &Id) {
        INSIDE.with_borrow_mut(|inside| inside.push(span.into_u64()));
    }

    fn exit(&self, span: &Id) {
        INSIDE.with_borrow_mut(|inside| {
            let found = inside.iter().rposition(|id| *id == span.into_u64());
            if let Some(at) = found {
                inside.remove(at);
            }
        });
    }

    fn clone_span(&self, span: &Id) -> Id {
        if let Some(span) = self.spans().get_mut(&span.into_u64()) {
            span.handles += 1;
        }
        span.clone()
    }

    fn try_close(&self, span: Id) -> bool {
        let id = span.into_u64();
        let mut spans = self.spans();
        let Some(span) = spans.get_mut(&id) else {
            return false;
        };
        span.handles -= 1;
        if span.handles > 0 {
            return false;
        }
        spans.remove(&id);
        true
    }

    fn current_span(&self) -> Current {
        let id = innermost();
        let spans = self.spans();
        let found = id.and_then(|id| Some((Id::from_u64(id), spans.get(&id)?)));
        found.map_or_else(Current::none, |(id, span)| Current::new(id, span.metadata))
    }
}

/// The span that this thread is in.
fn innermost() -> Option<u64> {
    INSIDE.with_borrow(|inside| inside.last().copied())
}

/// Fields as they are shown.
fn fields(fields: impl RecordFields) -> Result<String, fmt::Error> {
    let mut text = String::new();
    DefaultFields::new().format_fields(Writer::new(&mut text), fields)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use std::sync::Arc;

    use tracing::{debug, info, info_span, subscriber::with_default, warn};

    use super::*;

    impl Lines for Arc<Mutex<Vec<String>>> {
        fn line(&self, line: &str) {
            self.lock().unwrap().push(line.to_owned());
        }
    }

    /// What is said of each event while `work` is done, without the time.
    fn said(asked: Option<&str>, work: impl FnOnce()) -> Vec<String> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let log = Log::new(asked, Arc::clone(&lines));
        with_default(log, work);
        let lines = lines.lock().unwrap();
        let without_time = |line: &String| {
            let (time, rest) = line.split_once(' ').unwrap();
            assert!(time.starts_with("20") && time.ends_with('Z'), "{line}");
            rest.replace(module_path!(), "here")
        };
        lines.iter().map(without_time).collect()
    }

    #[test]
    fn a_line_has_its_spans_and_fields() {
        let said = said(None, || {
            info!(count = 3, "outside");
            let vmm = info_span!("vmm", pid = 7);
            let _vmm = vmm.enter();
            {
                let save = info_span!("save", to = ?"x", more = tracing::field::Empty);
                let _save = save.enter();
                tracing::Span::current().record("more", 5);
                warn!(count = 4, "inside");
                let elsewhere = info_span!(parent: None, "elsewhere");
                elsewhere.in_scope(|| info!("alone"));
                let under = info_span!(parent: &vmm, "under");
                drop(_save);
                under.in_scope(|| info!("under"));
            }
            info!("left");
        });
        assert_eq!(
            said,
            [
                " INFO here: outside count=3\n",
                " WARN vmm{pid=7}: save{to=\"x\" more=5}: here: inside count=4\n",
                " INFO elsewhere: here: alone\n",
                " INFO vmm{pid=7}: under: here: under\n",
                " INFO vmm{pid=7}: here: left\n",
            ]
        );
    }

    #[test]
    fn only_what_is_asked_for_is_said() {
        let work = || {
            debug!("little");
            warn!("much");
        };
        assert_eq!(said(None, work).len(), 1);
        assert_eq!(said(Some("debug"), work).len(), 2);
        assert_eq!(said(Some("info,fermata_vmm=error"), work).len(), 0);
        assert_eq!(said(Some("no such level=="), work).len(), 1);
    }

    #[test]
    fn a_span_is_kept_as_long_as_somebody_has_it_and_no_longer() {
        let log = Arc::new(Log::new(None, Arc::new(Mutex::new(Vec::new()))));
        with_default(Arc::clone(&log), || {
            let span = info_span!("one");
            let other = span.clone();
            drop(span);
            assert_eq!(log.spans().len(), 1);
            let _inside = other.enter();
            let current = tracing::Span::current();
            assert_eq!(current.metadata().unwrap().name(), "one");
        });
        assert!(log.spans().is_empty());
    }
}
