// Shows what sphinx-tippy has collected: a box beside a link that is pointed at or has the focus. It stands in
// for tippy.js, which no Python package brings, and takes what the extension passes to it.
window.tippy = (link, { content, maxWidth, onShow }) => {
  const delay = 250; // milliseconds
  let box = null;
  let timer = null;

  const place = () => {
    const at = link.getBoundingClientRect();
    const [width, height] = [document.documentElement.clientWidth, window.innerHeight];
    const left = Math.max(8, Math.min(at.left, width - box.offsetWidth - 8));
    const below = at.bottom + box.offsetHeight + 14 < height || at.top < box.offsetHeight + 14;
    box.style.left = `${left + window.scrollX}px`;
    box.style.top = `${(below ? at.bottom + 6 : at.top - box.offsetHeight - 6) + window.scrollY}px`;
  };
  const show = () => {
    if (box) return;
    box = document.createElement("div");
    box.className = "preview bd-content";
    box.setAttribute("role", "tooltip");
    box.style.maxWidth = `min(${maxWidth}px, calc(100vw - 16px))`;
    box.innerHTML = content;
    // The page has these already.
    box.querySelectorAll("[id]").forEach((element) => element.removeAttribute("id"));
    box.querySelectorAll(".headerlink").forEach((element) => element.remove());
    document.body.append(box);
    place();
    onShow?.({ popper: box });
    window.MathJax?.startup?.promise?.then(() => box && place());
  };
  const hide = () => {
    clearTimeout(timer);
    box?.remove();
    box = null;
  };

  link.addEventListener("mouseenter", () => (timer = setTimeout(show, delay)));
  link.addEventListener("focus", show);
  for (const event of ["mouseleave", "blur", "click"]) link.addEventListener(event, hide);
  link.addEventListener("keydown", ({ key }) => key === "Escape" && hide());
};
