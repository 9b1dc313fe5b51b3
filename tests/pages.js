// What is wrong with the page as it stands, for test_pages.py; [] where nothing is.
const found = [];
const root = document.documentElement;
if (root.scrollWidth > root.clientWidth) found.push(`page is ${root.scrollWidth} wide of ${root.clientWidth}`);
for (const image of document.images) {
  if (image.complete && !image.naturalWidth) found.push(`image ${image.src.slice(-60)}`);
  if (!image.alt && image.closest("article")) found.push(`no words for ${image.src.slice(-60)}`);
}
let last = 0;
for (const heading of document.querySelectorAll("article :is(h1, h2, h3, h4)")) {
  const level = Number(heading.tagName[1]);
  if (level > last + 1) found.push(`h${level} after h${last}: ${heading.textContent}`);
  last = level;
}
const parts = (text) => (text.match(/[\d.]+/g) || [0, 0, 0]).map(Number);
const light = (rgb) => {
  const [r, g, b] = rgb.map((v) => ((v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const over = (front, back, share) => front.slice(0, 3).map((v, i) => v * share + back[i] * (1 - share));
const ground = (element) => {
  if (!element) return [255, 255, 255];
  const own = parts(getComputedStyle(element).backgroundColor);
  const share = own.length > 3 ? own[3] : 1;
  return share === 1 ? own.slice(0, 3) : over(own, ground(element.parentElement), share);
};
const shown = (element) =>
  element ? Number(getComputedStyle(element).opacity) * shown(element.parentElement) : 1;
const faint = new Set();
const walker = document.createTreeWalker(document.querySelector("article") || document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || element.closest("script, style, svg, mjx-assistive-mml, .headerlink, button")) continue;
  if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
  const style = getComputedStyle(element);
  const color = parts(style.color);
  const back = ground(element);
  const [a, b] = [light(over(color, back, (color.length > 3 ? color[3] : 1) * shown(element))), light(back)].sort((x, y) => y - x);
  const large = parseFloat(style.fontSize) >= 24;
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < (large ? 3 : 4.5)) {
    faint.add(`${ratio.toFixed(1)} ${element.tagName}.${element.className}: ${walker.currentNode.data.trim().slice(0, 30)}`);
  }
}
return found.concat([...faint].slice(0, 5));
