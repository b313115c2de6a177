//! Lists the files of `web/public/` that browsers load, so that the binary carries them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// What browsers load, and as what.
const CONTENT_TYPES: &[(&str, &str)] = &[
    ("css", "text/css; charset=utf-8"),
    ("csv", "text/csv; charset=utf-8"),
    ("html", "text/html; charset=utf-8"),
    ("ico", "image/x-icon"),
    ("js", "text/javascript; charset=utf-8"),
    ("mjs", "text/javascript; charset=utf-8"),
    ("png", "image/png"),
    ("svg", "image/svg+xml"),
    ("ts", "text/plain; charset=utf-8"),
    ("webmanifest", "application/manifest+json"),
    ("woff2", "font/woff2"),
];

fn main() -> io::Result<()> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../web/public");
    let mut files = Vec::new();
    if root.is_dir() {
        println!("cargo:rerun-if-changed={}", root.display());
        collect(&root, &mut files)?;
    }
    // By text, not by folder: the binary searches it.
    files.sort_by_key(|file| file.display().to_string());
    let mut code = String::from("&[\n");
    for file in files {
        let extension = file
            .extension()
            .and_then(|extension| extension.to_str())
            .unwrap_or_default();
        let Some((_, content_type)) = CONTENT_TYPES.iter().find(|(known, _)| *known == extension) else {
            continue;
        };
        let path = file.strip_prefix(&root).expect("it was found under it").display();
        let file = file.display();
        writeln!(
            code,
            "    Asset {{ path: \"{path}\", content_type: \"{content_type}\", bytes: include_bytes!(r\"{file}\") }},"
        )
        .expect("a string takes everything");
    }
    code += "]\n";
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it")).join("assets.rs");
    fs::write(out, code)
}

fn collect(folder: &Path, into: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') {
            continue;
        }
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), into)?;
        } else {
            into.push(entry.path());
        }
    }
    Ok(())
}
